"""State, and weights, that live in RAM and are on the card for their use alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

from torch import Tensor, nn

from lowvram_db.memory import layers
from lowvram_db.memory.stream.engine import NoRoom, Stream
from lowvram_db.memory.stream.lanes import Lanes
from lowvram_db.memory.stream.ram import Home, Ram
from lowvram_db.memory.stream.reading import Rounds
from lowvram_db.memory.stream.schedule import planned, uses_of_a_step
from lowvram_db.optim.placement import Resident, State, part_bytes, parts


class Streamed(Resident):
    """A placement, and a lender of weights to layers.

    events: what a step does in its order, see schedule.uses_of_a_step, with the gradients of those parameters whose
        state is streamed. What comes out of turn is right, and late: up to a round of copies goes before it.
    room: bytes on the card, at least schedule.least_room(); more lets copies hide behind the computation.
    ram: with room for state_bytes() of each of these parameters, and for the weights of `lent`.
    lent: of parameters whose weight is streamed too, their layers. Beside its use such a parameter shows whatever is in
        the room.
    """

    stays = False

    def __init__(
        self,
        events: Sequence[tuple[nn.Parameter, bool]],
        room: int,
        ram: Ram,
        lanes: Lanes,
        lent: Mapping[nn.Parameter, nn.Module] | None = None,
    ) -> None:
        stepped = dict.fromkeys(p for p, is_read in events if not is_read)
        self._states = {p: number for number, p in enumerate(stepped)}
        self._layers = dict(lent or {})
        self._weights = {p: number for number, p in enumerate(self._layers, len(stepped))}
        self._uses = list(chain.from_iterable(uses_of_a_step(events, self._weights, self._states)))
        self._ram, self._lanes, self._room = ram, lanes, lanes.room(room)
        self._homes: dict[int, Home] = {}
        self._stream: Stream | None = None  # from when all homes are known to the end
        self._waiting: dict[nn.Parameter, Tensor] = {}  # weights that are on the card until they have been stepped
        self._learning = True  # else nothing but forward passes is going on
        self._resting = False

    def keep(self, p: nn.Parameter, state: State) -> State:
        if p in self._weights:
            self._homes[self._weights[p]] = self._ram.home(p.nbytes)
            self.kept(p).copy_(p.detach())
            p.data = layers.shown(self._room, p)
            layers.lend(self._layers[p], self)
        if p not in self._states:
            return super().keep(p, state)
        home = self._homes[self._states[p]] = self._ram.home(part_bytes(state))
        kept = parts(home.memory, state)
        for name, tensor in kept.items():
            tensor.copy_(state[name])
        if len(self._homes) == len(self._states) + len(self._weights):
            self._start()
        return {**state, **kept}

    def kept(self, p: nn.Parameter) -> Tensor:
        if p not in self._weights:
            return super().kept(p)
        return layers.shown(self._homes[self._weights[p]].memory, p)

    @contextmanager
    def lent(self, p: nn.Parameter, state: State) -> Iterator[tuple[Tensor, State]]:
        if p not in self._states:
            yield p, state
            return
        assert self._stream is not None
        weight, place = self._taken_for_step(p)
        try:
            yield weight, {**state, **parts(place, state)}
        finally:
            self._stream.give_back(self._states[p])
            if p in self._weights:
                self._stream.give_back(self._weights[p])

    @contextmanager
    def weight_of(self, p: nn.Parameter, learning: bool) -> Iterator[Tensor]:
        """For its layer; one that recomputes leaves it on the card for its step."""
        assert self._stream is not None
        if learning != self._learning:
            self._turn(learning)
        if p in self._waiting:
            yield layers.shown(self._waiting[p], p)
            return
        number = self._weights[p]
        place = self._taken(number) if learning else self._rounds.take(number)
        try:
            yield layers.shown(place, p)
        finally:
            if learning and self._stream.may_change(number):
                self._waiting[p] = place
            else:
                self._stream.give_back(number, changed=False)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        if self._stream is None or self._resting:
            yield
            return
        self._resting = True
        self._let_all_go()
        try:
            with self._stream.at_rest():
                yield
        finally:
            self._resting = False

    def end(self) -> None:
        if self._stream:
            self._let_all_go()
            self._stream.settle()
            self._stream = None
        for layer in self._layers.values():
            layers.lend(layer, None)
        self._lanes.close()

    def leave(self, p: nn.Parameter) -> None:
        if p in self._weights:
            p.data = self.kept(p).to(self._room.device, copy=True)

    def _start(self) -> None:
        homes = [self._homes[number] for number in range(len(self._homes))]
        sizes = [home.memory.nbytes for home in homes]
        self._visits = planned(self._uses, sizes, self._room.nbytes)
        self._stream = Stream(self._visits, homes, self._ram, self._lanes, self._room)
        self._rounds = Rounds(self._stream, sizes, self._room.nbytes)

    def _turn(self, learning: bool) -> None:
        """Begin a round: of a step, or of a forward pass alone."""
        assert self._stream is not None
        self._let_all_go()
        self._learning = learning
        if learning:
            self._stream.follow(self._visits)
        else:
            self._rounds.begin()

    def _taken_for_step(self, p: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The weight, which may wait for it, and the state's place."""
        assert self._stream is not None
        if p not in self._weights:
            return p, self._taken(self._states[p], to_change=True)
        if p in self._waiting:
            with suppress(NoRoom):
                place = self._stream.take(self._states[p], to_change=True)
                return layers.shown(self._waiting.pop(p), p), place
            self._let_all_go()  # the state's visit has been passed over, and before the next one comes the weight's
        weight = layers.shown(self._taken(self._weights[p], to_change=True), p)
        return weight, self._taken(self._states[p], to_change=True)

    def _taken(self, parcel: int, to_change: bool = False) -> Tensor:
        """On the card, for which those make way that only wait there."""
        assert self._stream is not None
        with suppress(NoRoom):
            return self._stream.take(parcel, to_change)
        self._let_all_go()
        return self._stream.take(parcel, to_change)

    def _let_all_go(self) -> None:
        for p in list(self._waiting):
            self._let_go(p)

    def _let_go(self, p: nn.Parameter) -> None:
        """As it came: it has not been stepped."""
        assert self._stream is not None
        del self._waiting[p]
        self._stream.give_back(self._weights[p], changed=False)
