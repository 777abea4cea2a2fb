"""Tries all interleavings of a few processes over shared memory, with kills.

A process is a chain of routines: generator functions that yield every shared access as an operation (`Load`,
`Store`, ...), receive its result, and return the next routine with its arguments, or None when they are done. What
a process does next depends only on the routine, its arguments and the results it received since, so these make up
its state, and two schedules that lead to the same memory and the same process states are explored once. A loop
must go through a return: a routine's results are forgotten with it.

Memory is sequentially consistent: what an unsuitable memory order would allow is not found here but by pin_evict.c.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Cell: TypeAlias = Hashable
Value: TypeAlias = Any


class Load(NamedTuple):
    """Result: the cell's value. `also` (here and below): a cell of the proof, not of the program, to store."""

    cell: Cell
    also: tuple[Cell, Value] | None = None


class Store(NamedTuple):
    cell: Cell
    value: Value
    also: tuple[Cell, Value] | None = None


class Update(NamedTuple):
    """Replaces the cell's value by a function of it in one step; result: the value before."""

    cell: Cell
    function: Callable[[Value], Value]
    also: tuple[Cell, Value] | None = None


class Await(NamedTuple):
    """Blocks until the cell has the value; with `timeout` it may also go on before."""

    cell: Cell
    value: Value
    timeout: bool = False


class Choose(NamedTuple):
    """Result: any one of the options that `options` finds in the memory. Blocks while there is none."""

    options: Callable[[Callable[[Cell], Value]], Sequence[Value]]


Operation: TypeAlias = Load | Store | Update | Await | Choose
Next: TypeAlias = tuple[Any, ...] | None  # (routine, *arguments)
Routine: TypeAlias = Generator[Operation, Value, Next]


class Killable(NamedTuple):
    """`processes` die together, at most `times`; each goes on with the routine given, or is gone (None)."""

    processes: Mapping[int, Next]
    times: int = 1
    also: tuple[tuple[Cell, Value], ...] = ()


class Violation(NamedTuple):
    message: str
    schedule: list[str]  # the steps that lead there

    def __str__(self) -> str:
        return f"{self.message}, after:\n  " + "\n  ".join(self.schedule)


class Result(NamedTuple):
    states: int
    transitions: int
    violation: Violation | None


class _ProcessStates:
    """Numbers the states of processes; a state's operation is found by replaying its routine once."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[tuple[tuple[Any, ...], tuple[Value, ...]]] = []
        self._successors: dict[tuple[int, Value], int] = {}
        self.operations: list[Operation | AssertionError] = []
        self.names: list[str] = []

    def start(self, routine: Next) -> int:
        """The state at the first operation of a routine; -1 if there is none."""
        return -1 if routine is None else self._replay(routine, ())

    def after(self, state: int, result: Value) -> int:
        key = (state, result)
        if key not in self._successors:
            routine, results = self._histories[state]
            self._successors[key] = self._replay(routine, (*results, result))
        return self._successors[key]

    def _replay(self, routine: tuple[Any, ...], results: tuple[Value, ...]) -> int:
        operation: Operation | AssertionError
        while True:
            generator = routine[0](*routine[1:])
            try:
                operation = next(generator)
                for result in results:
                    operation = generator.send(result)
                break
            except StopIteration as end:
                if end.value is None:
                    return -1
                routine, results = end.value, ()
            except AssertionError as error:
                operation = error
                break
        key = (routine, results)
        if key not in self._numbers:
            self._numbers[key] = len(self.operations)
            self._histories.append((routine, results))
            self.operations.append(operation)
            self.names.append(f"{routine[0].__name__}{routine[1:]}")
        return self._numbers[key]


def explore(
    memory: Mapping[Cell, Value],
    processes: Sequence[Next],
    invariant: Callable[[Callable[[Cell], Value]], str | None],
    *,
    killable: Sequence[Killable] = (),
    must_end: Sequence[int],
    limit: int = 2_000_000,
) -> Result:
    """All states reachable from `memory` and `processes`; stops at the first violation.

    Args:
        invariant: asked in every state; the broken rule in words, or None.
        must_end: processes that have to be able to end (or be dead) from every reachable state on: no deadlock, and
            nobody left behind for ever.
        limit: more states are an error, so that a model that grew does not quietly become a partial one.
    """
    cells = {cell: index for index, cell in enumerate(memory)}
    programs = _ProcessStates()
    count = len(processes)
    # One tuple is a whole state: process states, kills left, memory.
    first_cell = count + len(killable)
    start = (
        *(programs.start(routine) for routine in processes),
        *(kill.times for kill in killable),
        *memory.values(),
    )
    numbers: dict[tuple[Any, ...], int] = {start: 0}
    states = [start]
    parents, steps = array("i", [-1]), array("i", [-1])
    sources, targets = array("i"), array("i")

    def at(state: tuple[Any, ...]) -> Callable[[Cell], Value]:
        return lambda cell: state[first_cell + cells[cell]]

    def describe(state: tuple[Any, ...], step: int) -> str:
        if step >= count:
            return f"kill of {[*killable[step - count].processes]}"
        operation = programs.operations[state[step]]
        details = [str(part) for part in operation if not callable(part)]
        return f"process {step} in {programs.names[state[step]]}: {type(operation).__name__} {' '.join(details)}"

    def schedule(number: int) -> list[str]:
        lines: list[str] = []
        while parents[number] >= 0:
            lines.append(describe(states[parents[number]], steps[number]))
            number = parents[number]
        return lines[::-1]

    def violated(message: str, number: int) -> Result:
        return Result(len(states), len(sources), Violation(message, schedule(number)))

    def moves(state: tuple[Any, ...], process: int, number: int) -> list[tuple[Any, ...]]:
        operation = programs.operations[number]
        new = list(state)
        if isinstance(operation, Choose):
            outcomes = []
            for option in operation.options(at(state)):
                new[process] = programs.after(number, option)
                outcomes.append(tuple(new))
            return outcomes
        assert not isinstance(operation, AssertionError)
        index = first_cell + cells[operation.cell]
        if isinstance(operation, Await):
            if state[index] != operation.value and not operation.timeout:
                return []
            new[process] = programs.after(number, state[index] == operation.value)
            return [tuple(new)]
        if operation.also is not None:
            new[first_cell + cells[operation.also[0]]] = operation.also[1]
        if isinstance(operation, Store):
            new[index] = operation.value
        elif isinstance(operation, Update):
            new[index] = operation.function(state[index])
        new[process] = programs.after(number, None if isinstance(operation, Store) else state[index])
        return [tuple(new)]

    sound: set[tuple[Value, ...]] = set()  # memories in which the invariant was seen to hold
    pending = [0]
    while pending:
        here = pending.pop()
        state = states[here]
        if state[first_cell:] not in sound:
            broken = invariant(at(state))
            if broken is not None:
                return violated(broken, here)
            sound.add(state[first_cell:])
        successors: list[tuple[int, tuple[Any, ...]]] = []
        for process in range(count):
            number = state[process]
            if number < 0:
                continue
            operation = programs.operations[number]
            if isinstance(operation, AssertionError):
                return violated(f"process {process}: {operation}", here)
            successors.extend((process, new) for new in moves(state, process, number))
        for index, kill in enumerate(killable):
            alive = any(state[process] >= 0 for process in kill.processes)
            if state[count + index] > 0 and alive:
                dead = list(state)
                dead[count + index] -= 1
                for process, routine in kill.processes.items():
                    dead[process] = programs.start(routine)
                for cell, value in kill.also:
                    dead[first_cell + cells[cell]] = value
                successors.append((count + index, tuple(dead)))
        for step, new in successors:
            number = numbers.get(new, -1)
            if number < 0:
                number = len(states)
                if number >= limit:
                    raise RuntimeError(f"more than {limit} states: the model is too large to be explored whole")
                numbers[new] = number
                states.append(new)
                parents.append(here)
                steps.append(step)
                pending.append(number)
            sources.append(here)
            targets.append(number)
    stuck = _first_that_cannot_end(
        [all(state[process] < 0 for process in must_end) for state in states], sources, targets
    )
    if stuck is not None:
        return violated("somebody waits for ever", stuck)
    return Result(len(states), len(sources), None)


def _first_that_cannot_end(ended: Sequence[bool], sources: array[int], targets: array[int]) -> int | None:
    """The lowest state from which no path leads to an ended one."""
    can_end = np.array(ended)
    source, target = np.asarray(sources), np.asarray(targets)
    order = np.argsort(target, kind="stable")
    source, target = source[order], target[order]
    begins = np.searchsorted(target, np.arange(len(can_end) + 1))
    frontier = np.flatnonzero(can_end)
    while len(frontier):
        spans = [source[begins[state] : begins[state + 1]] for state in frontier]
        before = np.unique(np.concatenate(spans)) if spans else frontier[:0]
        frontier = before[~can_end[before]]
        can_end[frontier] = True
    stuck = np.flatnonzero(~can_end)
    return int(stuck[0]) if len(stuck) else None
