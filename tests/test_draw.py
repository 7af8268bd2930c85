"""docs/draw.py: the pictures are there and small, and what they say is true of the networks and of the replay."""

import importlib.util

import numpy as np
import pytest
import torch
from common import ROOT, SIZES, SOFT, Replay, make_args, make_networks, over, random_episodes
from PIL import Image

SPEC = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
draw = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw)


def test_three_small_pictures_are_written(tmp_path, capsys):
    draw.main(tmp_path)
    pictures = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert pictures.keys() == {"architecture.png", "batch.png", "teaser.png"}
    assert max(pictures.values()) < 250_000
    with Image.open(tmp_path / "teaser.png") as picture:
        assert picture.size == (1600, 640)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


@over(SOFT)
def test_shapes_are_those_of_the_networks(script):
    """Every layer that has weights is named, with its sizes."""
    networks = make_networks(script, make_args(script))
    sizes = {"N": SIZES.num_agents, "A": SIZES.num_actions, "O": SIZES.obs_size, "S": SIZES.state_size}
    parts = {"agent": networks.critic.agent, "g": networks.critic.g, "mixer": networks.critic.mixer, "f": networks.f}
    found = {f"{part}.{name}": layer for part, module in parts.items() for name, layer in module.named_children()}
    assert found.keys() == draw.SHAPES.keys()
    for name, layer in found.items():
        if isinstance(layer, torch.nn.GRU):
            widths = [layer.input_size, layer.hidden_size]
        else:
            linear = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
            widths = [linear[0].in_features, *(part.out_features for part in linear)]
        assert [eval(text, {}, sizes) for text in draw.SHAPES[name].split()] == widths, name


@pytest.mark.parametrize("lengths", [draw.LENGTHS, (3, 3, 1), (2,)])
@over(SOFT)
def test_the_batch_is_the_replays(script, lengths):
    rows, sizes, now = draw.batch_rows(lengths)
    episodes = random_episodes(lengths)
    batch = Replay(script, 10, episodes).sample(len(lengths))
    assert (batch.sizes, batch.now.tolist()) == (sizes, now)
    for i, (b, t) in enumerate(rows):
        assert any((batch.state[i].numpy() == episode["state"][t]).all() for episode in episodes
                   if len(episode["reward"]) == lengths[b])  # fmt: skip
    following = [rows.index((b, t + 1)) for b, t in (rows[i] for i in now)]
    assert following == [len(lengths) + i for i in range(len(now))]
