from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fewbit import ops
from fewbit.errors import RecipeError
from fewbit.load.capture import capture
from fewbit.net import Net, add_layer, name_of
from networks import make_images, make_net


def test_layers_are_in_the_order_in_which_they_run_under_their_own_names() -> None:
    layers = make_net("residual").layers()
    names = [layer.name for layer in layers]
    assert names.index("stem") < names.index("stem_bn") < names.index("conv1") < names.index("fc")
    by_name = {layer.name: layer for layer in layers}
    assert by_name["stem"].inputs == ("input",) and by_name["stem"].kind == "Conv"
    assert by_name["add"].kind == "Add" and set(by_name["add"].inputs) == {"relu", "bn2"}
    assert by_name["fc"].module.out_features == 5  # type: ignore[union-attr]


def test_edges_go_from_the_image_to_the_last_layer() -> None:
    net = make_net("branches")
    edges = net.edges()
    assert ("input", "a") in edges and ("input", "b") in edges
    reached = {"input"}
    for source, to in edges:
        assert source in reached  # in the order in which they run
        reached.add(to)
    assert reached == {"input", *(layer.name for layer in net.layers())}


def test_a_layer_is_found_by_its_name_or_told() -> None:
    net = make_net("residual")
    assert net.layer("fc").kind == "Linear"
    with pytest.raises(RecipeError, match="residual: has no layer 'fc2'; `fewbit inspect` lists them"):
        net.layer("fc2")


def test_copies_keep_what_is_known_of_the_images() -> None:
    net = make_net("residual")
    assert net.images is None and net.image_range is None and net.clone().images is None
    net.images, net.image_range = make_images(2), ((-1.0,) * 3, (1.0,) * 3)
    same, copy = net.with_facts("x"), net.clone()
    assert same.images is net.images and copy.images is not net.images
    assert copy.images is not None and torch.equal(copy.images, net.images)
    assert same.image_range == copy.image_range == net.image_range


def test_a_clone_shares_nothing() -> None:
    net = make_net("residual")
    before = net(make_images(2))
    other = net.clone()
    with torch.no_grad():
        for parameter in other.graph.parameters():
            parameter.add_(1)
    other.train()
    assert torch.equal(net(make_images(2)), before)
    assert not net.graph.training
    assert not {p.data_ptr() for p in net.graph.parameters()} & {
        p.data_ptr() for p in other.graph.parameters()
    }
    assert (other.name, other.input_size, other.classes, other.facts) == (
        net.name,
        net.input_size,
        net.classes,
        net.facts,
    )


def test_facts_grow_on_a_new_net_only() -> None:
    net = make_net("residual")
    other = net.with_facts("folded", "canonical")
    assert net.facts == frozenset() and other.facts == {"folded", "canonical"}
    assert other.with_facts("folded").facts == other.facts
    assert other.graph is net.graph


def test_training_mode_is_the_models_own() -> None:
    net = make_net("depthwise")
    assert net.train() is net and net.graph.training
    assert {m.training for m in net.graph.modules()} == {True}
    assert not net.eval().graph.training


def test_the_example_has_the_networks_size() -> None:
    assert make_net("gated").example(3).shape == (3, 3, 16, 16)


def test_it_shows_its_layers() -> None:
    shown = repr(make_net("residual"))
    assert shown.startswith("Net residual (3, 16, 16)\nstem ")
    assert "Conv           <- input" in shown


def test_refresh_drops_what_nothing_reads() -> None:
    net = make_net("residual")
    before = net(make_images(2))
    stem = net.layer("stem").node
    with net.graph.graph.inserting_after(stem):
        add_layer(net.graph, "useless", nn.ReLU(), stem)
    net.refresh()
    assert "useless" not in [layer.name for layer in net.layers()]
    assert "useless" not in dict(net.graph.named_modules())
    assert torch.equal(net(make_images(2)), before)


def test_an_added_layer_gets_a_free_name() -> None:
    net = make_net("residual")
    stem = net.layer("stem").node
    with net.graph.graph.inserting_after(stem):
        made = [add_layer(net.graph, "stem", nn.ReLU(), stem) for _ in range(2)]
        inside = add_layer(net.graph, "new.part", nn.ReLU(), stem)
    assert [name_of(node) for node in made] == ["stem_1", "stem_2"]
    assert name_of(inside) == "new.part"
    assert name_of(stem.args[0]) == "input"  # type: ignore[arg-type]


def test_a_name_that_is_a_folder_of_others_is_not_free() -> None:
    root = fx.GraphModule(nn.Module(), fx.Graph())
    x = root.graph.placeholder("input")
    add_layer(root, "block.conv", nn.ReLU(), x)
    assert name_of(add_layer(root, "block", nn.ReLU(), x)) == "block_1"


def test_a_tensor_read_twice_by_one_layer_is_one_edge() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (y + y).flatten(1)

    net = capture(Twice(), "twice", (3, 16, 16), 5)
    add = next(layer for layer in net.layers() if isinstance(layer.module, ops.Add))
    assert add.inputs == ("conv",) and len(add.node.args) == 2


def test_a_net_can_be_made_from_a_graph_alone() -> None:
    root = fx.GraphModule(nn.Module(), fx.Graph())
    x = root.graph.placeholder("x")
    root.graph.output(add_layer(root, "flat", nn.Flatten(), x))
    root.recompile()
    net = Net(root, "flat", (1, 2, 2), 4)
    assert net(net.example(3)).shape == (3, 4)
    assert [(layer.name, layer.kind, layer.inputs) for layer in net.layers()] == [
        ("flat", "Flatten", ("input",))
    ]
