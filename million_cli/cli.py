"""Typer commands, nothing else."""


def main() -> None:
    raise NotImplementedError
