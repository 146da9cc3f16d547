"""`tilewise doctor`."""


def doctor() -> None:
    raise NotImplementedError("tilewise doctor")
