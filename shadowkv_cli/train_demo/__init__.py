"""Trains the bundled model: `python -m shadowkv_cli.train_demo --output DIR`, then the same with
`--continue-from DIR` and another output.

Read in this order: `pieces` (text as tokens that can be joined), `drawing` (one growing sample),
`needles`, `chains`, `lists` and `questions` (the tasks), `repeats`, `batches`, `curriculum`,
`network`, `trainer`, `heldout`.
"""
