"""Which kind of teacher a server is: the server says it."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from sgopd.config import Config, UserError
from sgopd.servers import Server
from sgopd.teachers.openai import LogprobTeacher
from sgopd.teachers.remote import RemoteTeacher
from sgopd.teachers.served import HiddenTeacher


def remote_teacher(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> RemoteTeacher:
    """The teacher at `teacher_url`, by what the server says that it is.

    Raises:
        UserError: there is no such server, or it has no such model.
    """
    assert isinstance(config.teacher_url, str)
    server = Server("teacher", config.teacher_url, config.teacher_timeout, config.teacher_connections)
    models = server.models()
    model = next((one for one in models if one["id"] == config.teacher_model_name_or_path), None)
    if model is None:
        raise UserError(
            f"teacher_model_name_or_path: {server.url} has no model {config.teacher_model_name_or_path!r}. With "
            f"teacher_url it is the name of one that the server has: {', '.join(one['id'] for one in models)}"
        )
    if model.get("owned_by") == "sgopd":
        return HiddenTeacher(config, server, model, device)
    return LogprobTeacher(config, server, model, max(tokenizer.get_vocab().values()) + 1)
