import pytest
import torch
from jaxtyping import TypeCheckError

from left_out import without_shape_checks
from neuroplast.models.recording import at_positions


def test_shapes_are_checked_but_where_a_test_leaves_it_out():
    values, wrong = torch.zeros(2, 3), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(TypeCheckError):
        at_positions(values, wrong)
    with without_shape_checks():
        assert at_positions(values, wrong).shape == (1, 1)
    with pytest.raises(TypeCheckError):
        at_positions(values, wrong)
