"""`tilewise explain`."""


def explain() -> None:
    raise NotImplementedError("tilewise explain")
