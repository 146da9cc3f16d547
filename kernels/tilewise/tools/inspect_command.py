"""`tilewise inspect`."""


def inspect() -> None:
    raise NotImplementedError("tilewise inspect")
