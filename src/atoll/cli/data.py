"""`atoll data`: the catalog."""

from atoll.cli.guard import console


def data(name: str | None) -> None:
    """List the catalog, or describe one of its data sets; see `atoll data --help`."""
    from rich.table import Table
    from rich.text import Text

    from atoll import datasets

    out = console()
    if name is None:
        table = Table()
        for column in ("name", "what", "clients", "examples", "access", "licence"):
            table.add_column(column, justify="right" if column == "examples" else "left", overflow="fold")
        for known in datasets.names():
            card = datasets.card(known)
            what = (card.title, card.clients, f"{card.examples:,}", card.access, card.licence)
            table.add_row(Text(known, style="bold"), *(Text(cell) for cell in what))
        out.print(table)
        return
    card = datasets.card(name)
    out.print(Text(card.title, style="bold"))
    facts = (
        ("clients", card.clients), ("target", card.target), ("examples", f"{card.examples:,}"), ("source", card.source),
        ("licence", card.licence), ("access", card.access), ("in code", f"atoll.datasets.{card.name}()"),
    )  # fmt: skip
    grid = Table.grid(padding=(0, 2))
    for label, value in facts:
        grid.add_row(Text(label, style="dim"), Text(value))
    for place, trap in enumerate(card.traps):
        grid.add_row(Text("mind" if place == 0 else "", style="dim"), Text(trap))
    out.print(grid)
    if card.access == "download":
        out.print("Its clients are not described here, since that would download it.", style="dim")
        return
    described = getattr(datasets, name)().describe()
    table = Table(title="training, validation and test examples of each client", title_justify="left")
    for place, column in enumerate(described.columns):
        table.add_column(Text(str(column)), justify="right" if place else "left")
    for row in described.itertuples(index=False):
        table.add_row(*(Text(f"{v:.4g}" if isinstance(v, float) else str(v)) for v in row))
    out.print(table)
