"""Every World method has its single-process meaning, with no process group."""

from __future__ import annotations

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import allstep
from allstep.coordination import Alone
from allstep.errors import CollectiveError, WorldError
from allstep.placement import Placement
from allstep.world import internals


def test_a_world_of_one_has_no_process_group(one):
    one.barrier()
    one.all_reduce(torch.ones(2))
    assert not dist.is_initialized()
    assert one.backend is None


def test_it_is_rank_zero_of_one(one):
    place = (one.rank, one.world_size, one.local_rank, one.local_world_size, one.node_rank, one.is_main)
    assert place == (0, 1, 0, 1, 0, True)
    assert one.device == torch.device("cpu")
    assert isinstance(internals(one).coordinator, Alone)
    assert one.placement.launcher == "alone"


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "product"])
def test_reducing_over_one_rank_gives_a_new_equal_tensor(one, op):
    x = torch.tensor([1.5, -2.0])
    result = one.all_reduce(x, op)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


def test_gathering_and_broadcasting_give_copies(one):
    x = torch.arange(3)
    assert [each.tolist() for each in one.all_gather(x)] == [[0, 1, 2]]
    one.all_gather(x)[0].zero_()
    one.broadcast(x).zero_()
    assert x.tolist() == [0, 1, 2]
    assert one.broadcast(7) == 7
    assert one.gather_objects({"a"}) == [{"a"}]


def test_numbers_over_one_rank_keep_their_meaning(one):
    assert one.all_reduce(2**53 + 1) == 2**53 + 1
    assert one.all_gather(2.5) == [2.5]


def test_mistakes_are_the_same_errors_as_with_peers(one):
    with pytest.raises(CollectiveError, match="op is 'avg'"):
        one.all_reduce(1, "avg")
    with pytest.raises(CollectiveError, match="src is 1"):
        one.broadcast(1, src=1)
    with pytest.raises(CollectiveError, match="all_gather on rank 0 was given a str"):
        one.all_gather("text")
    with pytest.raises(CollectiveError, match="64 bits"):
        one.all_reduce(2**63)
    with pytest.raises(CollectiveError, match="uint64"):
        one.all_reduce(torch.ones(1, dtype=torch.uint64))
    with pytest.raises(CollectiveError, match="complex"):
        one.all_reduce(torch.ones(1, dtype=torch.complex64), "max")


def test_main_first_runs_the_body_once_and_passes_its_exception_on(one):
    with pytest.raises(KeyError), one.main_first():
        raise KeyError("x")


def test_wrap_only_moves(one):
    module = nn.Linear(2, 2)
    assert one.wrap(module) is module
    assert one.unwrap(module) is module


def test_print_prints(one, capsys):
    one.print("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_the_loader_takes_the_worlds_seed_unless_given_another(one):
    data = TensorDataset(torch.arange(64))

    def order(**options):
        loader = one.loader(data, batch_size=64, shuffle=True, **options)
        return next(iter(loader))[0].tolist()

    unseeded, explicit = order(), order(seed=5)
    one.seed_everything(5)
    assert order() == explicit != unseeded == order(seed=0)


def test_seeding_repeats_every_generator(one):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    assert one.seed_everything(3) == 3
    first = draw()
    one.seed_everything(3)
    assert draw() == first
    assert one.seed == 3
    one.seed_everything(4)
    assert draw() != first


def test_members_of_an_array_of_jobs_share_no_seed(one, monkeypatch):
    drawn, orders = set(), set()
    for member in ("", "0", "1"):
        monkeypatch.setenv("ALLSTEP_ARRAY_MEMBER", member)
        unseeded = one.loader(torch.utils.data.TensorDataset(torch.arange(64)), batch_size=64, shuffle=True, seed=None)
        orders.add(tuple(next(iter(unseeded))[0].tolist()))
        one.seed_everything(3)
        drawn.add(torch.rand(1).item())
        one.seed = None
    assert (len(drawn), len(orders)) == (3, 3)


def test_seeding_is_torchs_own_seeding_for_all_ranks_alike(one):
    one.seed_everything(11)
    mine = torch.rand(4)
    torch.manual_seed(11)
    assert torch.equal(mine, torch.rand(4))


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**63 - 1])
def test_seeds_beyond_32_bits_are_taken(one, seed):
    assert one.seed_everything(seed) == seed
    assert one.seed_everything(seed, per_rank=True) == seed


@pytest.mark.parametrize(("seed", "kind"), [(-1, ValueError), (2**63, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_seed_out_of_range_is_refused_and_nothing_recorded(one, seed, kind):
    with pytest.raises(kind, match="seed is"):
        one.seed_everything(seed)
    assert one.seed is None


def test_current_is_the_open_world_until_it_closes(bare_environment):
    assert allstep.World.current() is None
    with allstep.init(device="cpu") as world:
        assert allstep.World.current() is world
    assert allstep.World.current() is None


def test_init_while_a_world_is_open_is_an_error_and_changes_nothing(one):
    with pytest.raises(WorldError, match="while a World is open"):
        allstep.init()
    assert allstep.World.current() is one


def test_a_library_that_imports_a_notebooks_kernel_makes_no_notebook(one, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with pytest.raises(WorldError, match="while a World is open"):
        allstep.init()


def test_a_plain_call_closes_by_hand_and_twice_is_once(bare_environment):
    world = allstep.init(device="cpu")
    world.close()
    world.close()
    assert allstep.World.current() is None


def test_a_world_left_by_an_exception_is_closed_and_the_exception_goes_on(bare_environment):
    with pytest.raises(ZeroDivisionError), allstep.init(device="cpu"):
        1 / 0  # noqa: B018
    assert allstep.World.current() is None


def test_closing_an_old_world_again_leaves_the_new_one_current(bare_environment):
    old = allstep.init(device="cpu")
    old.close()
    with allstep.init(device="cpu") as new:
        old.close()
        assert allstep.World.current() is new


def test_a_world_shows_only_what_a_script_uses():
    place = {"rank", "world_size", "local_rank", "local_world_size", "node_rank", "is_main"}
    attributes = {"placement", "device", "backend", "seed", "mesh", "data_rank", "data_size", "data_ranks"}
    models = {"wrap", "unwrap", "rewrap", "unify_buffers", "autocast", "building", "clip_grad_norm_"}
    models |= {"loss_parallel", "load_pretrained", "plan"}
    models_and_data = models | {"to_device", "loader"}
    collectives = {"all_reduce", "all_gather", "broadcast", "gather_objects", "barrier", "main_first"}
    other = {"current", "section", "print", "to_numbers", "seed_everything", "close"}
    with allstep.init(device="cpu") as world:
        shown = {name for name in dir(world) if not name.startswith("_")}
    assert shown == place | attributes | models_and_data | collectives | other


USES = {
    "wrap": lambda world: world.wrap(nn.Linear(1, 1)),
    "unwrap": lambda world: world.unwrap(nn.Linear(1, 1)),
    "to_device": lambda world: world.to_device(1),
    "loader": lambda world: world.loader([1], batch_size=1),
    "all_reduce": lambda world: world.all_reduce(1),
    "all_gather": lambda world: world.all_gather(1),
    "broadcast": lambda world: world.broadcast(1),
    "gather_objects": lambda world: world.gather_objects(1),
    "barrier": lambda world: world.barrier(),
    "main_first": lambda world: world.main_first().__enter__(),
    "print": lambda world: world.print("x"),
    "seed_everything": lambda world: world.seed_everything(1),
    "with": lambda world: world.__enter__(),
}


@pytest.mark.parametrize("name", USES)
def test_a_closed_world_refuses_by_name(bare_environment, name):
    world = allstep.init(device="cpu")
    world.close()
    with pytest.raises(WorldError, match=f"{name} was used on a World that is closed"):
        USES[name](world)
    assert world.rank == 0


def test_init_can_seed(bare_environment, generators_restored):
    with allstep.init(device="cpu", seed=9) as world:
        drawn = torch.rand(1)
        assert world.seed == 9
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(1))


def test_a_bad_seed_leaves_no_world_open(bare_environment):
    with pytest.raises(ValueError, match="seed is -1"):
        allstep.init(device="cpu", seed=-1)
    assert allstep.World.current() is None


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_that_is_not_positive_is_refused(bare_environment, timeout):
    with pytest.raises(ValueError, match="timeout is"):
        allstep.init(timeout=timeout)


def test_a_broken_environment_fails_before_connecting(bare_environment, monkeypatch):
    monkeypatch.setenv("RANK", "two")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(allstep.AllstepError, match="RANK"):
        allstep.init()
    assert allstep.World.current() is None


def test_remarks_of_the_placement_are_shown(bare_environment, monkeypatch):
    monkeypatch.setattr("allstep.world.initialization.detect", lambda _: Placement("alone", warnings=("mind this",)))
    with pytest.warns(UserWarning, match="mind this"), allstep.init(device="cpu"):
        pass
