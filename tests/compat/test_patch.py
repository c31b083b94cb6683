"""patch() on a library made for the test: what it replaces, where, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from tolerances import assert_same
from torch import Tensor, nn

import mafnet_ops
from mafnet_ops.compat import _patch, patch
from mafnet_ops.compat.torchvision import deform_conv2d

THEIRS, OURS = torch.tensor(1.0), torch.tensor(2.0)


def their_function(x: Tensor, scale: float = 1.0) -> Tensor:
    return THEIRS * scale


def our_function(x: Tensor, scale: float = 1.0) -> Tensor:
    return OURS * scale


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return THEIRS + self.weight


class Sublayer(Layer):
    pass


class OurLayer(nn.Module):
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return OURS + self.weight


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`theirs`, and a module `user` that imported its function before."""
    theirs, user = ModuleType("theirs"), ModuleType("user")
    theirs.function = user.renamed = their_function  # type: ignore[attr-defined]
    theirs.Layer = Layer  # type: ignore[attr-defined]
    for module in (theirs, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = _patch._Library({"theirs:function": our_function}, {"theirs:Layer": OurLayer.forward})
    monkeypatch.setitem(_patch._LIBRARIES, "theirs", entry)
    yield theirs
    assert theirs.function is their_function and sys.modules["user"].renamed is their_function
    assert_same(Layer()(THEIRS).detach(), THEIRS.reshape(1))
    assert not _patch._ACTIVE


def test_functions_are_replaced_where_they_were_imported(library: ModuleType) -> None:
    user = sys.modules["user"]
    with patch("theirs"):
        assert_same(library.function(THEIRS, scale=2.0), 2 * OURS)
        assert_same(user.renamed(THEIRS), OURS)
        assert library.function.__name__ == "our_function"
    assert_same(library.function(THEIRS), THEIRS)


def test_what_is_imported_under_a_patch_is_put_back_too(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    with patch("theirs"):
        late.function = library.function  # type: ignore[attr-defined]
    assert late.function is their_function


def test_who_imported_the_drop_in_itself_keeps_it(library: ModuleType) -> None:
    user = sys.modules["user"]
    function = user.own = our_function  # a name in no module's namespace, beside one that is
    with patch("theirs"):
        pass
    assert user.own is function and our_function is function


def test_modules_that_exist_and_their_subclasses(library: ModuleType) -> None:
    """They keep weights, identity, pickles and copies."""
    layers = [Layer(), Sublayer()]
    with patch("theirs"):
        for layer in layers:
            for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert type(same) is type(layer)
                assert_same(same(THEIRS).detach(), OURS.reshape(1))
    for layer in layers:
        assert_same(layer(THEIRS).detach(), THEIRS.reshape(1))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_patches_nest_and_end_in_any_order(library: ModuleType, order: tuple[int, int]) -> None:
    patches = [patch("theirs"), patch("theirs")]
    patches[order[0]].undo()
    assert_same(library.function(THEIRS), OURS)
    patches[order[0]].undo()  # once is enough
    assert_same(library.function(THEIRS), OURS)
    patches[order[1]].undo()
    assert_same(library.function(THEIRS), THEIRS)


def test_an_error_in_the_block_undoes_too(library: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="inside"), patch("theirs"):
        raise RuntimeError("inside")


def test_a_library_that_does_not_import_leaves_nothing(library: ModuleType) -> None:
    _patch._LIBRARIES["theirs"].functions["no_such_library:function"] = our_function
    with pytest.raises(ImportError, match="no_such_library"):
        patch("theirs")
    assert_same(library.function(THEIRS), THEIRS)


@pytest.mark.parametrize("names", [(), ("nonsense",)])
def test_names(names: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match="patch: libraries: expected some of torchvision, mmcv, ba"
    ):
        patch(*names)


def test_a_patched_function_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph, although it goes through the wrapper that patch() makes."""
    theirs = ModuleType("theirs")
    theirs.deform_conv2d = their_function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    entry = _patch._Library({"theirs:deform_conv2d": deform_conv2d})
    monkeypatch.setitem(_patch._LIBRARIES, "theirs", entry)
    input, weight = torch.rand(1, 2, 5, 6), torch.rand(3, 2, 3, 3)
    offset = torch.rand(1, 18, 3, 4)

    def call(*tensors: Tensor) -> Tensor:
        result: Tensor = theirs.deform_conv2d(*tensors)
        return result

    with patch("theirs"):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        expected = mafnet_ops.modulated_deform_conv2d(input, offset, None, weight)
        assert_same(compiled(input, offset, weight), expected)
