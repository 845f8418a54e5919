"""What the host knows of a device's rows: a mask on the host or a number spare products, and nothing is waited for."""

import pytest

from tests.linear.test_linear import KNOWN, LATE, arguments_of, gradients, leaves_of, loss_of
from tests.support.accuracy import assert_rounding
from tests.support.batches import EVERY_LAYOUT, FAST_BACKEND
from tests.support.device import no_sync

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("config", [KNOWN, LATE], ids=["known", "late"])
@EVERY_LAYOUT
@FAST_BACKEND
def test_a_mask_on_the_host_or_a_number_change_nothing(backend, layout, config):
    arguments = arguments_of(backend, config, layout, num_active=None)
    wanted = gradients(arguments)
    mask = arguments["mask"]
    for change in ({"mask": mask.cpu()}, {"num_active": int(mask.sum())}, {"num_active": mask.numel()}):
        leaves = leaves_of(arguments)
        with no_sync():
            loss = loss_of(leaves, arguments | change)
            loss.backward()
        assert_rounding(loss.detach(), wanted["loss"])
        for name, leaf in leaves.items():
            assert_rounding(leaf.grad, wanted[name])
