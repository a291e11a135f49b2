"""The cells of `suite.bench step`, and the peer that stands beside them.

With a peer, our cells leave out what it has not (dropout, a factor of the embedding), so that all
of them compute the same but for the norm; that the peer's loss is ours is checked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from suite.benches.peers import Reference, published_norm, reference_of, settle_seconds
from suite.config import Config
from suite.errors import ConfigError
from suite.norms import NORMS
from suite.reference import Pair, check_losses

EAGER = "false"  # run.compile


@dataclass(frozen=True)
class Cell:
    """What is timed. backend: as asked for, None of a norm without; compile: "false" or a mode.

    peer: name of the field's own implementation, of which this is a cell; None: ours.
    """

    norm: str
    backend: str | None
    compile: str
    precision: str
    config: Config
    peer: str | None = None

    @property
    def name(self) -> str:
        """For notes: `dyt cpp, compile default, bf16-mixed`."""
        who = [self.peer, self.norm, self.backend]
        how = "eager" if self.compile == EAGER else f"compile {self.compile}"
        return f"{' '.join(word for word in who if word)}, {how}, {self.precision}"


def cell_of(config: Config) -> Cell:
    """The cell that a config is."""
    mode = config.run.compile
    return Cell(
        norm=config.norm_name,
        backend=getattr(config.norm, "backend", None),
        compile=EAGER if mode is False else str(mode),
        precision=config.trainer.precision,
        config=config,
    )


@dataclass(frozen=True)
class Peer:
    """The field's own implementation beside the cells. config: with its norm, settled."""

    reference: Reference
    config: Config
    seconds: float | None


def settle_peer(config: Config, *, seconds: float | None) -> Peer:
    """What the cells' task is compared with. Raises ConfigError where it names nothing that fits,
    or where its loss is not ours."""
    try:
        reference = reference_of(config.task_name)
        norm = published_norm(config)
        plain = replace(config, norm_name=norm, norm=NORMS[norm].options)
        plain = replace(plain, run=replace(plain.run, compile=False))
        settled = reference.settle(
            replace(plain, trainer=replace(plain.trainer, precision="32-true"))
        )
    except ConfigError as error:
        raise ConfigError(f"--peer: {error}") from None
    length = settle_seconds(seconds, reference=reference, task=config.task_name)
    pair = Pair(settled, rows=settled.data.batch_size, seconds=length)
    check_losses(*pair.losses(), name=reference.name)
    return Peer(reference, settled, length)


def settle_cell(cell: Cell, *, peer: Peer) -> Cell:
    """Without what the peer has not."""
    settled = peer.config
    config = replace(cell.config, model=settled.model, task=settled.task, data=settled.data)
    return replace(cell, config=config)


def peer_cells(cells: Sequence[Cell], *, peer: Peer) -> list[Cell]:
    """One for every compile and precision of the cells."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        config = replace(peer.config, run=cell.config.run, trainer=cell.config.trainer)
        made = replace(
            cell_of(config), norm=peer.config.norm_name, backend=None, peer=peer.reference.name
        )
        found.setdefault((cell.compile, cell.precision), made)
    return list(found.values())
