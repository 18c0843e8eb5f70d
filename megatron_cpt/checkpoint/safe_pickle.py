"""Pickles read as data: names stay names, and nothing is imported, looked up or called.

Python's own unpickler is a machine that calls what a file tells it to call. This one knows the instructions that torch and
pickle write today, makes plain values of them, and has no instruction that could run anything: where a pickle names a class
it gets a `Name`, where it makes an object it gets a `PickleRecord` of what it said.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

MOST_KEY = 2**60  # whole number as a key; from 2**61 - 1 on several have one hash
MOST_STEPS = 20_000_000  # instructions of one pickle: each may take some hundred bytes of memory
MOST_COPIED = 5_000_000  # values and bytes that calls copy, all together: a short pickle can name a long list often
SET_COST = 5  # an empty set takes the memory of so many values
MOST_BYTES_OF_INT = 16
MOST_FIELDS = 5000  # of an object; Megatron-LM's args have some hundred
MOST_DEPTH = 100  # of values within values
SCALARS = (str, int, float, bool, bytes, type(None))
PickleError = pickle.UnpicklingError
Pair = tuple[str, str]  # module and qualified name


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A class or function that a pickle names; it is never looked up."""

    module: str
    qualname: str

    @property
    def pair(self) -> Pair:
        """Module and qualified name."""
        return self.module, self.qualname

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(eq=False, slots=True)
class PickleRecord:
    """An object in a pickle: its class's name, what it is made of, and its state. Equal to itself only."""

    kind: Name
    args: tuple[Any, ...] = ()
    state: Any = None

    def fields(self) -> dict[Any, Any]:
        """Attributes of the object, as far as the state is a dictionary of them."""
        parts = self.state[:2] if type(self.state) is tuple else (self.state,)  # attributes, and those in slots
        if sum(len(part) for part in parts if type(part) is dict) > MOST_FIELDS:
            raise PickleError(f"a {self.kind} has more than {MOST_FIELDS} attributes")
        return {name: value for part in parts if type(part) is dict for name, value in part.items()}


@dataclass(frozen=True, eq=False, slots=True)
class PickleReference:
    """What a pickle says of something that is not in it: the memory of a tensor."""

    pid: Any


Maker = Callable[[tuple[Any, ...]], Any]


def read_pickle(
    content: bytes, values: Mapping[Pair, Any], makers: Mapping[Pair, Maker], known: Collection[Pair] | None = None
) -> Any:
    """What a pickle holds: plain values, `Name`, `PickleRecord` and `PickleReference`.

    Args:
        content: the pickle; what follows its end is not looked at
        values: what stands for a name, by (module, qualified name)
        makers: functions of this package that make plain values where a pickle calls that name; they check their arguments
        known: names that become records; any other is an error. Without it all names do

    Raises:
        PickleError: it is damaged, too large, or has an instruction that neither torch nor pickle writes today
    """
    try:
        return _Reader(content, values, makers, known).run()
    except (LookupError, struct.error, UnicodeDecodeError) as error:
        raise PickleError(f"the pickle is damaged: {type(error).__name__}") from error


def plain_copy(value: Any, convert: Callable[[Any, Callable[[Any], Any]], Any], most: int = 1_000_000) -> Any:
    """A copy of a value from a pickle, with `convert(value, copy)` applied to all that is no plain value.

    `copy` is for what such a value holds: it counts as a part of the whole, however deep the objects lie in each other.

    A copy, because the value may hold itself, or one part in many places: within `most` values and `MOST_DEPTH` it cannot.

    Raises:
        PickleError: it is too large or too deep
    """
    left = [most]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > MOST_DEPTH:
            raise PickleError(f"it holds more than {most} values, or values within values {MOST_DEPTH} deep")
        if type(value) in SCALARS:
            return value
        if type(value) in (list, tuple):
            return type(value)(copy(item, depth + 1) for item in value)
        if type(value) in (set, frozenset):
            return type(value)(copied_key(item, depth) for item in value)
        if type(value) is dict:
            return {copied_key(key, depth): copy(item, depth + 1) for key, item in value.items()}
        if type(value) is bytearray:
            return value
        return convert(value, lambda part: copy(part, depth + 1))

    def copied_key(key: Any, depth: int) -> Any:
        if type(key) is PickleRecord:
            raise PickleError(f"it holds a {key.kind} as a key; expected numbers and texts")
        return copy(key, depth + 1)

    return copy(value, 0)


def shown_value(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    if type(value) in (str, bytes):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if type(value) in (int, float, bool, type(None)):
        return repr(value)
    if type(value) in (PickleRecord, Name):
        return str(value.kind if type(value) is PickleRecord else value)
    return type(value).__name__


def is_key(value: Any) -> bool:
    """Whether a value may be a key of a dictionary or a member of a set: its hash takes no time and no code of its own.

    Of whole numbers only those that are their own hash, and in tuples only small ones: many others could be made that share
    one, and a dictionary of them takes time with the square of its size. (Hashes of texts differ from process to process.)
    """
    if type(value) is tuple:
        return len(value) <= 4 and all(
            0 <= item < 1 << 16 if type(item) is int else type(item) in (str, bytes, bool, type(None)) for item in value
        )
    if type(value) in (int, float):
        return abs(value) < MOST_KEY or value != value
    return type(value) in (*SCALARS, PickleRecord, Name)


class _Reader:
    """The machine: a stack, a memo, and a method for each instruction."""

    def __init__(
        self, content: bytes, values: Mapping[Pair, Any], makers: Mapping[Pair, Maker], known: Collection[Pair] | None
    ) -> None:
        self._content, self._at = content, 0
        self._values, self._makers, self._known = values, makers, known
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._may_copy = MOST_COPIED

    def run(self) -> Any:
        """The value that is left at the end."""
        for _ in range(MOST_STEPS):
            code = self._number("<B")
            if code == pickle.STOP[0]:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise PickleError(f"instruction {bytes([code])!r} at byte {self._at - 1} is not one that torch writes")
            step(self)
        raise PickleError(f"it has more than {MOST_STEPS} instructions")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def charge(self, count: int) -> None:
        """Take `count` from what may still be copied."""
        self._may_copy -= count
        if self._may_copy < 0:
            raise PickleError(f"its calls copy more than {MOST_COPIED} values")

    def _take(self, count: int) -> bytes:
        if count < 0 or count > len(self._content) - self._at:
            raise PickleError(f"it ends at byte {len(self._content)}; {count} more are announced at byte {self._at}")
        self._at += count
        return self._content[self._at - count : self._at]

    def _number(self, form: str) -> int:
        number: int
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return number

    def _line(self) -> str:
        end = self._content.find(b"\n", self._at, self._at + 1000)
        if end < 0:
            raise PickleError(f"the name at byte {self._at} has no end")
        return (self._take(end + 1 - self._at)[:-1]).decode()

    def _items(self) -> list[Any]:
        """What has been pushed since the last mark."""
        items, self._stack = self._stack, self._below.pop()
        return items

    # Values

    def int_(self, form: str) -> None:
        self.push(self._number(form))

    def float_(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def long(self, form: str) -> None:
        count = self._number(form)
        if not 0 <= count <= MOST_BYTES_OF_INT:
            raise PickleError(f"a number of {count} bytes; expected at most {MOST_BYTES_OF_INT}")
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def text(self, form: str) -> None:
        self.push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def bytes_(self, form: str, kind: type = bytes) -> None:
        self.push(kind(self._take(self._number(form))))

    # Containers

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def tuple_(self, count: int | None) -> None:
        if count is None:
            items = self._items()
        else:
            items = [self._stack.pop() for _ in range(count)][::-1]
        self.push(tuple(items))

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not PickleRecord:  # that of a list of another kind
            raise PickleError(f"it appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2 or type(target) not in (dict, PickleRecord):
            raise PickleError(f"it sets {len(items)} keys and values in a {type(target).__name__}")
        if type(target) is PickleRecord:  # that of a dictionary of another kind
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self) -> None:
        items, target = self._items(), self._stack[-1]
        if type(target) is not set:
            raise PickleError(f"it adds members to a {type(target).__name__}")
        target.update(_key(item) for item in items)

    def set_(self) -> None:
        self.charge(SET_COST)
        self.push(set())

    def frozenset_(self) -> None:
        self.push(frozenset(_key(item) for item in self._items()))

    # Stack and memo

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, form: str) -> None:
        self.push(self._memo[self._number(form)])

    # Names and objects

    def name(self, module: Any, qualname: Any) -> None:
        if type(module) is not str or type(qualname) is not str:
            raise PickleError(f"it names {shown_value(module)}.{shown_value(qualname)}")
        name = Name(module[:200], qualname[:200])
        if name.pair in self._values:
            self.push(self._values[name.pair])
            return
        if self._known is not None and name.pair not in self._known and name.pair not in self._makers:
            raise PickleError(f"it names {name}, which a checkpoint has no need of")
        self.push(name)

    def stack_name(self) -> None:
        qualname, module = self._stack.pop(), self._stack.pop()
        self.name(module, qualname)

    def make(self, named: bool = False) -> None:
        """An object: the record of it, or a plain value if there is a maker."""
        more = self._stack.pop() if named else {}
        args, kind = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple or type(more) is not dict or type(kind) not in (Name, PickleRecord):
            raise PickleError(f"it calls a {type(kind).__name__} with a {type(args).__name__}")
        if type(kind) is PickleRecord:  # what another call gave
            self.push(PickleRecord(kind.kind, args))
        elif kind.pair in self._makers and not more:
            self.charge(SET_COST + len(args) + sum(len(arg) for arg in args if type(arg) in (str, bytes, list, tuple)))
            self.push(self._makers[kind.pair](args))
        else:
            self.push(PickleRecord(kind, args, more or None))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is PickleRecord:
            target.state = state
        elif type(target) is not dict:  # an OrderedDict with attributes: not wanted
            raise PickleError(f"it sets the state of a {type(target).__name__}")

    def reference(self) -> None:
        self.push(PickleReference(self._stack.pop()))


def _key(value: Any) -> Any:
    if not is_key(value):
        raise PickleError(f"a key of a dictionary is a {type(value).__name__}; expected a text or a number")
    return value


Step = Callable[[_Reader], object]
_STEPS: dict[int, Step] = {
    pickle.PROTO[0]: lambda r: r._take(1),
    pickle.FRAME[0]: lambda r: r._take(8),
    pickle.NONE[0]: lambda r: r.push(None),
    pickle.NEWTRUE[0]: lambda r: r.push(True),
    pickle.NEWFALSE[0]: lambda r: r.push(False),
    pickle.BININT[0]: lambda r: r.int_("<i"),
    pickle.BININT1[0]: lambda r: r.int_("<B"),
    pickle.BININT2[0]: lambda r: r.int_("<H"),
    pickle.LONG1[0]: lambda r: r.long("<B"),
    pickle.LONG4[0]: lambda r: r.long("<i"),
    pickle.BINFLOAT[0]: lambda r: r.float_(),
    pickle.SHORT_BINUNICODE[0]: lambda r: r.text("<B"),
    pickle.BINUNICODE[0]: lambda r: r.text("<I"),
    pickle.BINUNICODE8[0]: lambda r: r.text("<Q"),
    pickle.SHORT_BINBYTES[0]: lambda r: r.bytes_("<B"),
    pickle.BINBYTES[0]: lambda r: r.bytes_("<I"),
    pickle.BINBYTES8[0]: lambda r: r.bytes_("<Q"),
    pickle.BYTEARRAY8[0]: lambda r: r.bytes_("<Q", bytearray),
    pickle.EMPTY_LIST[0]: lambda r: r.push([]),
    pickle.EMPTY_DICT[0]: lambda r: r.push({}),
    pickle.EMPTY_SET[0]: _Reader.set_,
    pickle.EMPTY_TUPLE[0]: lambda r: r.push(()),
    pickle.MARK[0]: _Reader.mark,
    pickle.TUPLE[0]: lambda r: r.tuple_(None),
    pickle.TUPLE1[0]: lambda r: r.tuple_(1),
    pickle.TUPLE2[0]: lambda r: r.tuple_(2),
    pickle.TUPLE3[0]: lambda r: r.tuple_(3),
    pickle.APPEND[0]: lambda r: r.append([r._stack.pop()]),
    pickle.APPENDS[0]: lambda r: r.append(r._items()),
    pickle.SETITEM[0]: lambda r: r.set_items([r._stack.pop(), r._stack.pop()][::-1]),
    pickle.SETITEMS[0]: lambda r: r.set_items(r._items()),
    pickle.ADDITEMS[0]: _Reader.add_items,
    pickle.FROZENSET[0]: _Reader.frozenset_,
    pickle.POP[0]: lambda r: r._stack.pop(),
    pickle.POP_MARK[0]: _Reader._items,
    pickle.BINPUT[0]: lambda r: r.put(r._number("<B")),
    pickle.LONG_BINPUT[0]: lambda r: r.put(r._number("<I")),
    pickle.MEMOIZE[0]: lambda r: r.put(len(r._memo)),
    pickle.BINGET[0]: lambda r: r.get("<B"),
    pickle.LONG_BINGET[0]: lambda r: r.get("<I"),
    pickle.GLOBAL[0]: lambda r: r.name(r._line(), r._line()),
    pickle.STACK_GLOBAL[0]: _Reader.stack_name,
    pickle.NEWOBJ[0]: _Reader.make,
    pickle.NEWOBJ_EX[0]: lambda r: r.make(named=True),
    pickle.REDUCE[0]: _Reader.make,
    pickle.BUILD[0]: _Reader.build,
    pickle.BINPERSID[0]: _Reader.reference,
}
