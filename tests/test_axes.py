"""The algebra of axes: splits, joins and merges."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_pruner.graph.axes import (
    concat,
    find,
    flag,
    freeze,
    fresh,
    labels,
    leaves,
    size_of,
    split_concat,
    split_product,
    unify,
)


def label(dim, leaf):
    return labels(dim)[id(find(leaf))].tolist()


def test_a_view_then_a_merge_gives_the_common_factors():
    rows, heads = fresh(12), fresh(12)
    split_product(rows[0], 3)
    split_product(heads[0], 6)
    unify(rows, heads)
    assert [leaf.size for leaf in leaves(rows)] == [3, 2, 2]
    assert list(map(id, leaves(rows))) == list(map(id, leaves(heads)))


def test_chunks_of_one_axis_have_their_own_positions():
    fused = fresh(6)
    gate, up = split_concat(fused, [3, 3])
    unify(gate, up)
    (leaf,) = leaves(fused)
    assert label(fused, leaf) == [0, 1, 2, 0, 1, 2]


def test_concatenations_with_other_cuts_meet_in_the_finest():
    a, b = fresh(6), fresh(6)
    split_concat(a, [2, 4])
    split_concat(b, [3, 3])
    unify(a, b)
    assert [leaf.size for leaf in leaves(a)] == [2, 1, 3]
    assert list(map(id, leaves(a))) == list(map(id, leaves(b)))


def test_a_product_meets_equal_pieces_and_shares_its_inner_axis():
    fused = fresh(8)
    pieces = split_concat(fused, [4, 4])
    other = fresh(8)
    _, inner = split_product(other[0], 2)
    unify(fused, other)
    assert {id(leaf) for piece in pieces for leaf in leaves(piece)} >= {id(leaf) for leaf in leaves(inner)}
    assert label(fused, leaves(inner)[0]) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_cut_inside_a_head_freezes():
    dim = fresh(12)
    split_product(dim[0], 3)
    split_concat(dim, [6, 6])
    assert all(leaf.frozen for leaf in leaves(dim))


def test_factorisations_that_do_not_divide_freeze():
    a, b = fresh(6), fresh(6)
    split_product(a[0], 2)
    split_product(b[0], 3)
    unify(a, b)
    assert all(leaf.frozen for leaf in [*leaves(a), *leaves(b)])


def test_marks_survive_refinement_and_merging():
    a, b = fresh(8), fresh(8)
    freeze(a, "because")
    flag(b, "norm")
    split_product(b[0], 2)
    unify(a, b)
    assert [(leaf.frozen, leaf.flags) for leaf in leaves(a)] == [("because", {"norm"})] * 2


def test_an_axis_that_meets_itself_has_no_positions():
    a, b = fresh(4), fresh(4)
    unify(a, b)
    assert labels((*a, *b))[id(find(a[0]))].numel() == 0


def test_a_size_one_dim_is_the_empty_product():
    assert fresh(1) == () and size_of(()) == 1


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_labels_say_the_row_major_index_of_every_position(sizes, data):
    """After any refinement of a dim, the label of a leaf at a position is that leaf's index there."""
    dim = tuple(atom for n in sizes for atom in fresh(n))
    grid = torch.arange(size_of(dim)).view(sizes)
    for axis, atom in enumerate(dim):
        expected = torch.arange(sizes[axis]).view([-1 if i == axis else 1 for i in range(len(sizes))]).expand(sizes)
        assert label(dim, atom) == expected.flatten()[grid.flatten()].tolist()
    cut = data.draw(st.integers(1, sizes[0] - 1)) * size_of(dim[1:])
    first, second = split_concat(dim, [cut, size_of(dim) - cut])
    whole = concat([first, second])
    for leaf in leaves(whole):
        assert label(whole, leaf) == label(dim, leaf)


@given(st.permutations([2, 2, 3]), st.permutations([2, 2, 3]))
def test_merging_never_leaves_two_opinions(a, b):
    """After a merge both dims agree on every leaf that is still free, and on its positions."""
    x, y = (tuple(atom for n in sizes for atom in fresh(n)) for sizes in (a, b))
    unify(x, y)
    free = [[leaf for leaf in leaves(dim) if not leaf.frozen] for dim in (x, y)]
    assert list(map(id, free[0])) == list(map(id, free[1]))
    assert all(label(x, leaf) == label(y, leaf) for leaf in free[0])
    assert a != b or len(free[0]) == 3
