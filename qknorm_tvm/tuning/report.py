"""What a session tells while it runs."""


class Reporter:
    """Hears how a session goes; this one stays silent."""

    def line(self, text: str) -> None:
        """Something is done."""

    def status(self, text: str) -> None:
        """How far it is; replaces the status before."""
