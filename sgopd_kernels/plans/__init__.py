"""Plans: in which way a chunk of tokens gets its statistics and gradients.

    exact       all logits in fp32, dense gradient products (exact.py)
    filtered    gradient products over the (token, column) pairs that matter (pairs.py)
    quantized   logits in 16-bit integers, those that carry probability again in fp32; then as filtered (quantized.py)
    blocks      products of bf16 numbers on tiles, two of them a factor where the gradient's energy lies (blocks.py)
    narrow      on devices, and "exact" in `Stats.plan`: 16-bit operands in the gradient products (narrow.py)

A plan knows the primitives of a backend and an error budget. The driver walks a ladder of them: it knows which plans a
call may take, and what happens to a chunk whose estimated error exceeds the budget.
"""
