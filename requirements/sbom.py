"""A software bill of materials of this environment: CycloneDX 1.5 in JSON, to the file that is named.

    make sbom      # dist/sbom.json, of the locked test environment

Every installed distribution with its version, licence, package URL and direct dependencies; the hash of the file it
came from where requirements/test.lock has it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "sgopd"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(metadata: importlib.metadata.PackageMetadata) -> list[dict[str, Any]]:
    expression = metadata.get("License-Expression")
    if expression:
        return [{"expression": expression}]
    named = [c.rsplit(" :: ", 1)[1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    words = (metadata.get("License") or "").strip().splitlines()
    named = named or [word for word in words[:1] if word]
    return [{"license": {"name": name}} for name in named]


def bill() -> dict[str, Any]:
    lock = (ROOT / "requirements" / "test.lock").read_text()
    hashes = {name: digest for name, digest in re.findall(r"^(\S+)==\S+ --hash=sha256:(\w+)$", lock, re.M)}
    found = {normal(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    reference = {name: f"pkg:pypi/{name}@{d.version}" for name, d in found.items()}
    components, dependencies = [], []
    for name, d in sorted(found.items()):
        needs = {normal(m.group()) for r in d.requires or [] if (m := re.match(r"[\w.-]+", r)) and "extra ==" not in r}
        dependencies.append(
            {"ref": reference[name], "dependsOn": sorted(reference[n] for n in needs if n in reference)}
        )
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": reference[name],
            "name": name,
            "version": d.version,
            "purl": reference[name],
        }
        if licences := licence(d.metadata):
            component["licenses"] = licences
        if name in hashes:
            component["hashes"] = [{"alg": "SHA-256", "content": hashes[name]}]
        components.append(component)
    root = next((c for c in components if c["name"] == PROJECT), None)
    if root is None:
        raise SystemExit(f"{PROJECT} is not installed in {sys.prefix}: `make sbom` installs it")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**root, "type": "application"}},
        "components": [c for c in components if c is not root],
        "dependencies": dependencies,
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    made = bill()
    target.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{target}: {len(made['components'])} components")
