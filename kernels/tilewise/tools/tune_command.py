"""`tilewise tune`."""


def tune() -> None:
    raise NotImplementedError("tilewise tune")
