"""What clients have sent, as the log shows it: on one line, and without what a terminal obeys, so that nobody writes lines of others."""


class OneLine:
    r"""Something for the log, whose line ends, and whatever else is not printable, become escape sequences, such as `\n`.

    Its text is made when the log wants it: logging sees to it that one that cannot be made does no harm.
    """

    def __init__(self, text: object) -> None:
        self._text = text

    def __str__(self) -> str:
        text = str(self._text)
        return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
