"""Trains the bundled model: `python -m shadowkv_cli.train_demo --minutes 15 --output DIR`.

Read in this order: `pieces` (text as tokens that can be joined), `drawing` (one growing sample),
`needles`, `chains`, `lists` and `questions` (the tasks), `repeats`, `batches`, `curriculum`,
`network`, `trainer`, `heldout`.
"""
