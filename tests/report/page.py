"""Reads a page as a browser would: tags that do not close in order fail."""

from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "path", "use", "line"}


class Page(HTMLParser):
    """Checks that tags close in order and gathers text, bold text, tags, ids and outside addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.bold: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self._attributes(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._attributes(tag, attributes)

    def _attributes(self, tag, attributes):
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "b":
            self.bold.append(data)

    @property
    def harmless(self) -> bool:
        """Nothing that a text could have brought in: no script, image or handler, no outside address, no id twice."""
        outside = [address for address in self.addresses if not address.startswith("#")]
        return not (
            outside
            or self.handlers
            or self.tags & {"script", "img", "iframe", "object"}
            or len(self.ids) != len(set(self.ids))
        )
