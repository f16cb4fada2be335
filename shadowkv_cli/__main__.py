"""python -m shadowkv_cli: the same as `shadowkv`, where scripts are not on the path."""

from shadowkv_cli.cli import main

main()
