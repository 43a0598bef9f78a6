"""Interpreter of the pickles that torch.save writes for a state dict.

Python's unpickler calls what a file names and allocates what it asks for: classes, memo tables of
any size, keys nested so deeply that their hash overflows the stack. Here a stack machine reads the
opcodes of `pickletools` that a state dict consists of, builds plain values, and refuses the rest. A
class or function of the file is only a name (`Global`); calls and storages go to two callbacks.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from megalodon_jax.errors import TorchFileError

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Opcodes whose argument is the value.
_LITERALS = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
})  # fmt: skip
_MAX_DEPTH = 1000
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_PUT = ("BINPUT", "LONG_BINPUT")
_GET = ("BINGET", "LONG_BINGET")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(NamedTuple):
    """A class or function that a pickle refers to; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class PickleMachine:
    """Interprets one pickle.

    Args:
      call: result of a call, given the name and its arguments.
      load_storage: the object of a persistent id.

    The callbacks raise `TorchFileError`; the entry of the state dict is added to the message.
    """

    def __init__(
        self,
        call: Callable[[Global, tuple[Any, ...]], Any],
        load_storage: Callable[[Any], Any],
    ):
        self._call = call
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """The value of a pickle.

        Raises:
          TorchFileError: it is malformed, or has anything but tensors, containers and plain values.
        """
        try:
            for opcode, argument, _position in pickletools.genops(pickled):
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, argument)
        except TorchFileError as error:
            raise TorchFileError(f"{self._where()}{error}") from error
        # ValueError: a truncated or unknown opcode.
        except (ValueError, IndexError, KeyError) as error:
            raise TorchFileError(f"{self._where()}malformed pickle: {error}") from error
        raise TorchFileError("malformed pickle: it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(self._pop() for _ in range(count))[::-1])
        elif name == "MARK":
            if len(self._outer_stacks) >= _MAX_DEPTH:
                raise TorchFileError(f"containers are nested more than {_MAX_DEPTH} deep")
            self._outer_stacks.append(stack)
            self._stack = []
        elif name == "TUPLE":
            items = self._pop_to_mark()
            self._stack.append(tuple(items))
        elif name in _PUT or name == "MEMOIZE":
            self._memo[len(self._memo) if argument is None else argument] = self._top()
        elif name in _GET:
            stack.append(self._memo[argument])
        else:
            self._change(name, argument)

    def _change(self, name: str, argument: Any) -> None:
        """Opcodes that call, or fill containers."""
        if name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            self._stack.append(Global(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self._stack.append(Global(str(module)[:80], str(attribute)[:80]))
        elif name == "BINPERSID":
            self._stack.append(self._load_storage(self._pop()))
        elif name == "REDUCE":
            arguments, function = self._pop(), self._pop()
            if type(function) is not Global or type(arguments) is not tuple:
                raise TorchFileError("the file calls a value that is no function")
            self._stack.append(self._call(function, arguments))
        elif name == "BUILD":
            # torch adds version numbers to the dictionary; the state is not needed.
            self._pop()
            if type(self._top()) is not dict:
                raise TorchFileError("the file sets attributes of a value that has none")
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_to_mark() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
            self._set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = self._pop_to_mark() if name == "APPENDS" else [self._pop()]
            if type(self._top()) is not list:
                raise TorchFileError("the file appends to a value that is no list")
            self._top().extend(items)
        else:
            raise TorchFileError(
                f"the file has the pickle opcode {name}; only tensors, containers and plain values "
                "are accepted"
            )

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise TorchFileError("the file sets items of a value that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys, such as nested tuples, could overflow the stack when they are hashed.
            if type(key) not in (str, int):
                raise TorchFileError(f"a key is of type {type(key).__name__}; use texts")
            if key in target:
                raise TorchFileError(f"the entry {key!r:.80} is there twice")
            target[key] = value

    def _top(self) -> Any:
        if not self._stack:
            raise IndexError("a value is missing")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        del self._stack[-1]
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self._outer_stacks:
            raise IndexError("a mark is missing")
        items = self._stack
        self._stack = self._outer_stacks.pop()
        return items

    def _where(self) -> str:
        """The entry that is being read: the last key before its value."""
        stacks = [self._stack, *reversed(self._outer_stacks)]
        keys = (value for stack in stacks for value in reversed(stack) if type(value) is str)
        key = next(keys, None)
        return "" if key is None else f"entry {key!r:.80}: "
