"""--capture-video in every script that plays a game, and --env in the MPE scripts: other people's environments."""

import functools
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import MPE, SMACV2, config_of, event_log, one_sentence, over, read_metrics, run_main
from PIL import Image

import hasac_smacv2
import mappo_smacv2
import plot
from envs.film import save_film
from envs.smacv2_render import PAUSE, Film
from envs.smacv2_sim import SMACv2Sim
from envs.starcraft2 import StarCraft2

LEARN = ["--batch-size", 2, "--buffer-size", 8]  # at once


def options(script, **changes) -> list:
    """Of a run that is over at once, filmed on the simulator."""
    settings = dict(map="zerg_2_vs_2", backend="sim", total_timesteps=80, eval_interval=40, eval_episodes=2) | changes
    words = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]
    return words + ([] if script is mappo_smacv2 else LEARN)


# --- Films ---


@over([*SMACV2, mappo_smacv2, hasac_smacv2])
def test_the_last_test_is_filmed_and_changes_nothing(script, tmp_path, monkeypatch, capsys):
    size = 512 if script is SMACV2[0] else 128  # pictures as users get them once, and small ones elsewhere
    monkeypatch.setattr(Film, "frames", functools.partialmethod(Film.frames, size=size))
    for name, more in (("filmed", ["--capture-video"]), ("plain", [])):
        assert run_main(script, capsys, "--run-dir", tmp_path / name, *options(script), *more)[0] == 0
    assert read_metrics(tmp_path / "filmed") == read_metrics(tmp_path / "plain")
    assert not (tmp_path / "plain" / "evaluation.gif").exists()
    with Image.open(tmp_path / "filmed" / "evaluation.gif") as film:
        assert film.size[0] == size
        assert film.n_frames > 5
    (image,) = event_log(tmp_path / "filmed").Images("evaluation")
    assert image.step == 80
    assert image.encoded_image_string == (tmp_path / "filmed" / "evaluation.gif").read_bytes()
    (tmp_path / "filmed" / "evaluation.gif").unlink()
    code, output = run_main(script, capsys, "--evaluate", tmp_path / "filmed" / "policy.pt", "--capture-video")
    assert (code, "win rate" in output) == (0, True)
    assert (tmp_path / "filmed" / "evaluation.gif").exists()


def test_a_film_of_a_lone_policy_has_its_name_and_comes_after_the_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Film, "frames", functools.partialmethod(Film.frames, size=128))
    script = SMACV2[1]
    assert run_main(script, capsys, "--run-dir", tmp_path / "run", *options(script))[0] == 0
    policy = (tmp_path / "run" / "policy.pt").rename(tmp_path / "zerg.pt")
    code, output = run_main(script, capsys, "--evaluate", policy, "--capture-video")
    assert code == 0
    assert output.index("win rate") < output.index(f"film: {tmp_path / 'zerg.gif'}")
    with Image.open(tmp_path / "zerg.gif") as film:
        assert film.n_frames > 5

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "write_bytes", refuse)
    code, output = run_main(script, capsys, "--evaluate", policy, "--capture-video")
    assert (code, "win rate" in output) == (1, True)
    assert "zerg.gif cannot be written; no space or permission?" in output


def test_a_film_has_the_first_battles_since_the_reset():
    film = Film(SMACv2Sim("zerg_2_vs_2", 2, seed=3), battles=2)
    for _ in range(2):
        _, info = film.reset(seed=1)
        ended = []
        while len(ended) < 4:
            actions = info["action_mask"].argmax(-1)
            _, _, terminated, _, info = film.step(actions)
            ended += [len(film.moments)] if terminated[0] else []
        assert [over for _, _, over in film.moments].count(True) == 2
        assert len(film.moments) <= ended[2]
        assert film.moments[0][1] == 0
    played = max(k for k, (_, _, over) in enumerate(film.moments) if over) + 1  # without the battle just begun
    assert len(list(film.frames(size=128))) == played + 2 * (PAUSE - 1)


def test_what_cannot_be_filmed_is_refused_before_a_file_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in (*SMACV2, mappo_smacv2, hasac_smacv2):
        monkeypatch.setattr(script, "make_env", lambda args, *_: StarCraft2.__new__(StarCraft2))
        sentence = one_sentence(run_main(script, capsys, *options(script, backend="starcraft2"), "--capture-video"))
        assert "replay_folder" in sentence
    for script in MPE:
        environment = ["--env", "mpe2.simple_reference_v3", "--capture-video"]
        assert "--capture-video" in one_sentence(run_main(script, capsys, *environment))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_of_a_film(tmp_path, monkeypatch):
    path_class = type(tmp_path)

    def write_half(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(path_class, "write_bytes", write_half)
    with pytest.raises(OSError, match="no space or permission"):
        save_film([np.zeros((8, 8, 3), np.uint8)], tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_without_ffmpeg_the_gif_is_kept_and_the_run_ends_well(tmp_path, monkeypatch, capsys):
    def write_frames(*_, **__):
        raise RuntimeError("No ffmpeg exe could be found.\nInstall it.")

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(write_frames=write_frames))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "imageio_ffmpeg")
    assert save_film([np.zeros((8, 8, 3), np.uint8)], tmp_path / "film.gif") == [tmp_path / "film.gif"]
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]
    warning = f"warning: {tmp_path / 'film.mp4'} is left out (No ffmpeg exe could be found.)\n"
    assert capsys.readouterr().err == warning


# --- Games by name ---

AGREE = '''
import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv


class Agree(ParallelEnv):
    """Both agents see one of three symbols, and are rewarded while both choose it."""

    metadata = {"name": "agree"}
    possible_agents = ["a", "b"]

    def __init__(self, length=10):
        self.length = length

    def observation_space(self, agent):
        return Box(0, 1, (3,))

    def action_space(self, agent):
        return Discrete(3)

    def look(self):
        self.symbol = int(self.random.integers(3))
        return {agent: np.eye(3, dtype=np.float32)[self.symbol] for agent in self.agents}

    def reset(self, seed=None, options=None):
        self.random = np.random.default_rng(seed) if seed is not None or not hasattr(self, "random") else self.random
        self.agents, self.t = list(self.possible_agents), 0
        return self.look(), {agent: {} for agent in self.agents}

    def step(self, actions):
        agreed = all(action == self.symbol for action in actions.values())
        self.t += 1
        over = not agreed or self.t == self.length
        seen, agents = self.look(), self.agents
        self.agents = [] if over else agents
        return seen, dict.fromkeys(agents, float(agreed) / 2), dict.fromkeys(agents, over), dict.fromkeys(
            agents, False), {agent: {} for agent in agents}


def make(length=10):
    return Agree(int(length))
'''


@pytest.fixture
def agree(tmp_path, monkeypatch):
    (tmp_path / "agree_game.py").write_text(AGREE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "agree_game:make"
    sys.modules.pop("agree_game", None)


@over(MPE)
def test_a_game_by_name_is_learnt(script, agree, tmp_path, capsys):
    """Named in banner, folder, files and plot; resumed and tested again without naming it."""
    script_options = ["--env", agree, "--total-timesteps", 1600, "--eval-interval", 800, "--eval-episodes", 32]
    script_options += ["--batch-size", 32, "--learning-rate", 0.005, "--target-update-interval", 50]
    script_options += ["--alpha", 0.1] if script is MPE[0] else ["--epsilon-anneal-time", 800]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        code, output = run_main(script, capsys, *script_options)
    assert code == 0, output
    assert "PettingZoo: agree_game_make, 2 agents, 3 actions" in output
    assert "mpe2" not in output
    (folder,) = tmp_path.glob(f"runs/agree_game_make__{script.__name__}__pettingzoo__1__*")
    config = config_of(folder)
    assert (config["environment"], config["backend"], config["args"]["env"]) == (agree, "pettingzoo", agree)
    assert float(read_metrics(folder)[-1]["return_mean"]) > 9  # of at most 10; an untrained team gets about 0.1
    assert float(read_metrics(folder)[0]["return_mean"]) < 3
    run = plot.read_run(folder)
    assert (run.game, run.task) == ("PettingZoo (pettingzoo)", agree)
    code, output = run_main(script, capsys, "--evaluate", folder, "--eval-episodes", 8)
    assert code == 0
    assert output.count("PettingZoo: agree_game_make") == 1
    assert run_main(script, capsys, "--resume", folder, "--total-timesteps", 1640)[0] == 0
    assert config_of(folder, "summary")["env_steps"] == 1640


@over(MPE)
def test_a_game_of_another_package_is_played_with_its_options(script, tmp_path, capsys):
    """Episodes are cut off, which mpe2 does by truncation; speakers and listeners differ in what they see and do."""
    run_options = ["--run-dir", tmp_path, "--env", "mpe2.simple_speaker_listener_v4", "--total-timesteps", 96]
    run_options += ["--env-options", "max_cycles", 6, "team_reward", "mean", "--eval-interval", 48]
    code, output = run_main(script, capsys, *run_options, "--eval-episodes", 4, *LEARN)
    assert code == 0, output
    assert config_of(tmp_path, "summary")["episodes"] == 96 // 6
    assert json.loads((tmp_path / "config.json").read_text())["team_reward"] == "mean"
    replay = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["replay"]
    assert not replay["terminated"].any()
    assert replay["mask"][:, 0].all(-1).sum() == 0  # the speaker has 3 actions, the listener 5
    assert replay["mask"][:, 1].all()


@over(MPE)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--env no_such_module", "no_such_module cannot be imported"),
        ("--env mpe2.simple_reference_v3:nothing", "has no function nothing"),
        ("--env mpe2.simple_reference_v3 --env-options speed 3", "cannot be made with the options {'speed': 3"),
        ("--env mpe2.simple_reference_v3 --env-options team_reward best", "expected one of sum, mean"),
        ("--env-options team_reward mean", "MPE Spread has no option team_reward"),
    ],
)
def test_games_that_cannot_be_get_one_sentence(script, words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in one_sentence(run_main(script, capsys, *words.split()))
    assert not list(tmp_path.iterdir())
