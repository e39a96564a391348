"""Tensors that follow each other in the same memory."""

import torch

from compress.reuse import Products, Reuse, replaced


def test_a_tensor_takes_the_memory_of_one_like_it_that_was_given():
    reuse, X = Reuse(), torch.arange(6.0).view(2, 3)
    first = reuse.take(X, torch.bfloat16)
    assert torch.equal(first, X.bfloat16()) and first.data_ptr() != X.data_ptr()
    other = reuse.take(X + 1, torch.bfloat16)  # the first is still read
    assert torch.equal(first, X.bfloat16()) and other.data_ptr() != first.data_ptr()
    place = first.data_ptr()
    reuse.give([first])
    unlike = [reuse.take(X.view(3, 2), torch.bfloat16), reuse.take(X, torch.float32)]
    assert place not in [x.data_ptr() for x in unlike]
    second = reuse.take(X + 2, torch.bfloat16)
    assert second.data_ptr() == place and torch.equal(second, (X + 2).bfloat16())
    assert reuse.take(X, torch.bfloat16).data_ptr() != place  # given once, taken once


def test_memory_that_was_cleared_is_not_taken_again():
    reuse, X = Reuse(), torch.ones(4)
    held = reuse.take(X, torch.float32)
    reuse.give([held])
    reuse.clear()
    assert reuse.take(X, torch.float32).data_ptr() != held.data_ptr()


def test_a_tensor_is_replaced_in_place_where_it_fits():
    old, new = torch.zeros(2, 6), torch.arange(4.0).view(2, 2)
    found = replaced(old, new)
    assert torch.equal(found, new) and found.shape == new.shape and found.data_ptr() == old.data_ptr()
    assert torch.equal(replaced(new, old), old) and replaced(new, old) is old  # too large
    assert replaced(old, new.double()).dtype == torch.float64
    assert replaced(torch.zeros(6, 2).T, new) is new  # its memory is not in one piece


def test_products_are_computed_once_each_and_when_they_are_asked_for():
    linear = torch.nn.Linear(3, 2)
    inputs = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.inference_mode():
        expected = [linear(X) for X in inputs]
        before = inputs[0].clone()
        products = Products(linear, inputs)
        assert len(products) == 2 and torch.equal(inputs[0], before)
        assert torch.equal(products[1], expected[1]) and torch.equal(inputs[0], before)
        assert all(torch.equal(products[i], expected[i]) for i in (0, 1, 0, 1))
        assert products[0].data_ptr() == inputs[0].data_ptr()
