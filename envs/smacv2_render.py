"""Pictures and films of the simulator's battles, drawn by Pillow without a display.

    env.render(0, agent=2)                                        # a moment of battle 0 as an array, of agent 2's sight
    python -m envs.smacv2_sim terran_5_vs_5 --watch battle.gif    # the two scripted players
    record(env, lambda env: play(env), "battle.gif")              # what any player does with an environment

Allies are blue, enemies orange, and the shape on a unit is its type's. Bodies have their true radii; the bars above are
shield and health. A line leads to a unit's target, bold while it strikes or heals, and a short one to where an agent
was told to walk. The dead stay where they fell, as empty rings.
"""

from collections import deque

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .film import check_path, save_evaluation, save_film
from .smacv2_sim import (
    EPISODE_LIMIT,
    HEAL_RANGE,
    LOOPS_PER_STEP,
    MAP_SIZE,
    MEDIVAC,
    MOVE,
    READY,
    TARGET,
    UNIT_NAMES,
    SMACv2Sim,
    count_alive,
    give_order,
    judge,
    play_loop,
)

FINE = 3  # everything is drawn this many times as large, and averaged
ALLY, ENEMY, HEALTH, SHIELD, HEALING = (0, 98, 168), (206, 84, 0), (20, 160, 80), (70, 190, 235), (20, 160, 80)
INK, PAPER, MARGIN, GRID, EMPTY = (30, 30, 30), (250, 250, 247), (235, 235, 230), (230, 230, 225), (70, 70, 70)
WHOLE_MAP = (0, 0, MAP_SIZE)
CLOSEST = 14  # cells across the narrowest view that follows a battle
PAUSE = 12  # frames for which the end of a battle is seen
SHAPES = {  # of a star's or, where the second number is 1, a regular polygon's outline
    "baneling": (9, 0.55, 0.8),  # corners, radius of the inner corners, size in body radii
    "colossus": (4, 0.35, 0.85),
    "hydralisk": (4, 1, 0.6),
    "marauder": (4, 1, 0.65),
    "marine": (16, 1, 0.45),
    "medivac": (4, 0.35, 0.8),
    "stalker": (3, 1, 0.7),
    "zealot": (16, 1, 0.5),
    "zergling": (3, 1, 0.7),
}


def outline(kind, x, y, radius):
    """Corners of a type's shape on a body of this radius, the first one up."""
    corners, inner, size = SHAPES[kind]
    angles = np.arange(2 * corners) * np.pi / corners
    radii = radius * size * np.where(np.arange(2 * corners) % 2, inner if inner < 1 else np.cos(np.pi / corners), 1)
    return [(x + r * np.sin(angle), y - r * np.cos(angle)) for angle, r in zip(angles, radii, strict=True)]


def disc(x, y, radius):
    return x - radius, y - radius, x + radius, y + radius


def outcome(units, step, rules):
    """How a battle stands: "", or "won", "lost", "draw" or "time is up" once it has ended."""
    over, won = judge(units, rules)
    if over and not won and count_alive(units, 0, len(units), False) == 0:
        return "draw"
    return ("won" if won else "lost") if over else "time is up" if step >= EPISODE_LIMIT else ""


def draw(env, units, step, agent=None, size=512, label="", view=WHOLE_MAP):
    """Draw a moment of a battle.

    Args: env, the SMACv2Sim that it is from; units, UNIT (U,); step; agent, whose sight (wide circle) and reach of its
    target actions (narrow circle), both to the others' centres, are shown, or None; size, the width in pixels; label,
    text for the head line; view, the square that is seen: west edge, south edge and width in cells. Returns:
    (size * 9 / 8, size, 3) uint8. Errors: ValueError for an agent or a size that cannot be.
    """
    N, rules = env.num_agents, env._rules
    if agent is not None and not (isinstance(agent, (int, np.integer)) and 0 <= agent < N):
        raise ValueError(f"agent is {agent!r}, expected None or an integer from 0 to {N - 1}.")
    if not (isinstance(size, (int, np.integer)) and 128 <= size <= 4096):
        raise ValueError(f"size is {size!r}, expected an integer from 128 to 4096.")
    size -= size % 16  # as films want it
    width, head = FINE * size, FINE * size // 16
    west, south, cells = view
    scale = width / cells
    picture = Image.new("RGB", (width, width + 2 * head), PAPER)
    pen = ImageDraw.Draw(picture, "RGBA")  # colours with a fourth number are mixed with what is below
    font = ImageFont.load_default(head * 0.53)

    def pixels(x, y):  # north is up
        return np.stack([(x - west) * scale, head + (cells - y + south) * scale], -1)

    places = pixels(units["x"], units["y"])  # (U, 2)
    bodies = rules.table[units["type"]]

    for x, y in pixels(*2 * [np.arange(0, MAP_SIZE + 1, 4)]):
        pen.line((x, head, x, head + width), GRID, FINE)
        pen.line((0, y, width, y), GRID, FINE)
    if agent is not None and units["alive"][agent]:
        for radius, colour in ((bodies["sight"][agent], (*ALLY, 22)), (bodies["mask_range"][agent], (*ALLY, 40))):
            pen.ellipse(disc(*places[agent], radius * scale), colour, (*ALLY, 120), FINE)
    for k in np.flatnonzero(units["alive"] == 0):
        colour = ALLY if k < N else ENEMY
        pen.ellipse(disc(*places[k], bodies["radius"][k] * scale), None, (*colour, 110), FINE)
        pen.polygon(outline(UNIT_NAMES[units["type"][k]], *places[k], bodies["radius"][k] * scale), (*colour, 50))
    living = np.flatnonzero(units["alive"])
    for k in living:
        unit, goal = units[k], None
        if unit["order"] == TARGET and units["alive"][unit["target"]]:
            goal, heals = places[unit["target"]], unit["type"] == MEDIVAC
            touch = bodies["radius"][k] + bodies["radius"][unit["target"]]
            in_reach = np.hypot(*(goal - places[k])) / scale <= touch + HEAL_RANGE + 1e-6
            bold = in_reach if heals else unit["attack"] != READY or unit["cooldown"] > 0
        elif unit["order"] == MOVE:
            goal, heals, bold = pixels(unit["order_x"], unit["order_y"]), False, False
        if goal is not None:
            colour = HEALING if heals else ALLY if k < N else ENEMY
            pen.line((*places[k], *goal), (*colour, 200 if bold else 60), FINE * 2 if bold else FINE)
    for k in living[np.argsort(bodies["plane"][living], kind="stable")]:  # flyers and colossi above the rest
        (x, y), r, colour = places[k], bodies["radius"][k] * scale, ALLY if k < N else ENEMY
        pen.ellipse(disc(x, y, r), colour, "white", FINE)
        pen.polygon(outline(UNIT_NAMES[units["type"][k]], x, y, r), "white")
    for k in living:
        (x, y), body = places[k], bodies[k]
        half, top, high = max(body["radius"] * scale, 0.4 * scale), places[k][1] - body["radius"] * scale, FINE * 2.5
        for name, colour in (("health", HEALTH), ("shield", SHIELD)):
            if body[name] > 0:
                top -= high + FINE
                filled = x - half + 2 * half * units[name][k] / body[name]
                pen.rectangle((x - half, top, x + half, top + high), EMPTY)
                pen.rectangle((x - half, top, max(filled, x - half), top + high), colour)

    pen.rectangle((0, 0, width, head), MARGIN)
    pen.rectangle((0, head + width, width, 2 * head + width), MARGIN)
    left, right = (int(units["alive"][part].sum()) for part in (slice(N), slice(N, None)))
    gap, middle = head * 0.35, head / 2
    pen.text((gap, middle), f"{env.map_name}{label and ', '}{label}", INK, font, anchor="lm")
    end = outcome(units, step, rules)
    pen.text((width * 0.70, middle), f"step {step}", INK, font, anchor="rm")
    pen.text((width - gap, middle), end or f"{left} : {right}", INK, font, anchor="rm")
    x, y = gap, head * 1.5 + width
    for name, colour in (("allies", ALLY), ("enemies", ENEMY)):
        pen.text((x, y), name, colour, font, anchor="lm")
        x += pen.textlength(name, font) + 2 * gap
    for kind in rules.team_types:
        name, r = UNIT_NAMES[kind], head * 0.3
        x += r
        pen.ellipse(disc(x, y, r), (110, 110, 110))
        pen.polygon(outline(name, x, y, r), "white")
        pen.text((x + r + gap / 2, y), name, INK, font, anchor="lm")
        x += r + 2.5 * gap + pen.textlength(name, font)
    return np.array(picture.reduce(FINE))


def view_of(units):
    """The square in which the living units are seen, see draw()."""
    places = np.stack([units["x"], units["y"]], -1)[units["alive"] == 1].reshape(-1, 2)
    low, high = (places.min(0), places.max(0)) if len(places) else (np.zeros(2), np.full(2, MAP_SIZE))
    cells = min(max((high - low).max() + 5, CLOSEST), MAP_SIZE)
    corner = np.clip((low + high - cells) / 2, 0, MAP_SIZE - cells)
    return np.array([*corner, cells])


class Film:
    """A SMACv2Sim that remembers what environment 0 looked like since the last reset: after each step, the last one of
    a battle included."""

    def __init__(self, env, keep=None, battles=None):
        """Args: env; keep, how many moments to remember, the last ones; battles, how many, the first ones; None: all.

        Errors: ValueError for another game.
        """
        if not isinstance(env, SMACv2Sim):
            raise ValueError("Films are of the simulator's battles; StarCraft II has replays, see its replay_folder.")
        self.env, self.moments = env, deque(maxlen=keep)  # of (units, step, ended)
        self.battles, self.left = battles, battles

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seed=None):
        result = self.env.reset(seed)
        self.left = self.battles
        self.moments.clear()
        self._remember(self.env._world.units[0], self.env._world.battles[0], False)
        return result

    def step(self, actions):
        """The simulator's, which begins the next battle by itself: the end of one is played again, on copies."""
        if self.left == 0:
            return self.env.step(actions)
        units, battles = self.env._world.units[0].copy(), self.env._world.battles[:1].copy()
        result = self.env.step(actions)
        if result[2][0]:
            N, rules = self.env.num_agents, self.env._rules
            for i in range(N):
                give_order(units, i, int(actions[0][i]), rules)
            for _ in range(LOOPS_PER_STEP):
                play_loop(units, rules.table, battles[0], N)
            battles["step"] += 1
            self._remember(units, battles[0], True)
            self.left = None if self.left is None else self.left - 1
        if not result[2][0] or self.moments.maxlen is None:
            self._remember(self.env._world.units[0], self.env._world.battles[0], False)
        return result

    def _remember(self, units, battle, ended):
        self.moments.append((units.copy(), int(battle["step"]), ended))

    def draw(self, **options):
        """A picture of the last moment remembered. Args: see draw()."""
        units, step, _ = self.moments[-1]
        return draw(self.env, units, step, **options)

    def frames(self, follow=True, **options):
        """Pictures of all that was played, without a battle that was only begun; each end is seen for a while.

        Args: follow, whether the view closes in on the units that live; options agent, size and label, see draw().
        """
        ends = [k for k, (_, _, ended) in enumerate(self.moments) if ended]
        shown = list(self.moments)[: ends[-1] + 1 if ends else None]
        view = np.array(WHOLE_MAP)
        for units, step, ended in shown:
            if follow:
                wanted = view_of(units)
                view = wanted if step == 0 else view + 0.15 * (wanted - view)
            frame = draw(self.env, units, step, view=view, **options)
            yield from [frame] * (PAUSE if ended else 1)

    def save_film(self, place, step=0):
        """Write evaluation.gif, for a script's --capture-video: see save_evaluation."""
        return save_evaluation(self.frames(), place, step)


def record(env, play, path, fps=8, **options):
    """Film what `play(env)` plays in battle 0 of a SMACv2Sim.

    Args: play, a function that resets and steps the environment it is given; path, fps, see save_film; options agent,
    size, label and follow, see Film.frames. Returns: the paths written.
    """
    check_path(path)
    film = Film(env)
    play(film)
    return save_film(film.frames(**options), path, fps)


def watch(path, maps, players):
    """Film a battle on each map of each player, a dict of functions (env, mask) -> actions. Returns: paths written."""
    check_path(path)
    frames = []
    for map_name in maps:
        for name, choose in players.items():
            film, terminated = Film(SMACv2Sim(map_name, 1)), [False]
            _, info = film.reset()
            while not terminated[0]:
                _, _, terminated, _, info = film.step(choose(film, info["action_mask"]))
            frames += film.frames(label=name)
    return save_film(frames, path)
