"""SMACv2 without StarCraft II: a batched simulator of the protoss, terran and zerg battles, in one file.

Why: the real game answers about a hundred steps per second and has to be installed by hand. This file replaces the
game, not the algorithm: it offers the observations, states, action masks, rewards and endings of the SMACv2 package
(Ellis et al. 2023, https://arxiv.org/abs/2212.07489) for many battles at once, with the battle itself compiled by
numba. Results on it are comparable with each other; they are not results on StarCraft II.

    import numpy as np
    from envs.smacv2_sim import SMACv2Sim
    env = SMACv2Sim("protoss_5_vs_5", num_envs=64, seed=1)
    obs, info = env.reset()                                        # (64, 5, 92)
    actions = info["action_mask"].argmax(-1)                       # (64, 5), the first available action of each agent
    obs, reward, terminated, truncated, info = env.step(actions)

    python -m envs.smacv2_sim terran_10_vs_10      # 2,000 random and 2,000 attack-the-nearest battles, about 10 seconds
    python -m envs.smacv2_sim terran_5_vs_5 --watch battles.gif    # one of each, to look at
    python benchmarks/simulator.py                 # steps per second
    pytest tests/test_smacv2_sim.py

The first use compiles the kernels (about 15 seconds) and keeps them in __pycache__, or where else numba may write.

Three doors lead here, docs/simulator.md: envs/smacv2_package.py stands in for the smacv2 package in other people's
trainers, envs/pettingzoo_smacv2.py is a PettingZoo environment, and envs/smacv2_render.py draws.

Words: a *loop* is the game's smallest time unit, 1/16 of a catalogue ("data", game speed Normal) second; one
environment step is 8 loops, half a data second. Lengths are map cells; the map is 32 x 32 and flat. Shapes: E battles
(environments), N agents (allies), M enemies, U = N + M units, A actions, O observation and S state features. Units
0..N-1 of a battle are the allies, N..U-1 the enemies. Sources named below: "SMACv2 package" is its Python code
(behaviour of February 2024), "map script" the trigger script in the package's map 32x32_flat, "WoL unit catalogue"
the Wings of Liberty unit data on which that map rests (the ladder's LotV figures differ and are kept as a second
table).

Modelled: teams, starts, agent order, masks, observation, state, reward and endings of the package; persistent orders;
enemies as the map script drives them (an enemy without an order is sent at its nearest ally and stays on it) with
their reflex to attack what is near while they have none; passive allies; reach from edge to edge; wind-up and missile
flight; random weapon delay; shields, armour per hit, bonus damage, double hits; the colossus' line and the baneling's
disc (also when it is killed); medivac healing, energy and acceleration; regeneration; bodies that push apart by plane
(ground, air, colossus) and pass around what blocks them; a border that holds them.

Not modelled: the game's own path finding and crowd steering (ours only looks at the bodies it touches); turning and
firing arcs; a unit's call for help to idle friends; re-targeting by an enemy that has an order (the map script has
none either). Assumed, because neither the package nor the catalogue settles it: a shot broken off during wind-up leaves
the weapon ready; missiles never miss a living target and outlive their shooter; a colossus' beam and a zealot's second
hit end with their owner; a medivac follows its patient even at full health; an enemy medivac, which cannot attack,
flies towards the ally at which the script sends it, healing on its way (so the game's curves suggest,
results/smacv2_sim.md); units meet splash with their edge; each stage of an attack (wind-up, flight, beam, second hit)
rounds up to whole loops and carries no fraction over.
"""

import functools
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
from numba import njit
from numba.core import event


def has_cache():
    """Does numba find a folder to keep compiled kernels in? Where it does not, to ask for it is an error."""
    try:
        njit(cache=True)(has_cache)
    except RuntimeError:
        return False
    return True


CACHE = has_cache()
allocating_kernel = njit(cache=CACHE, error_model="numpy")  # kept between runs; no check for division by 0, no fastmath
# Most kernels make no array, so that numba need not count who refers to one: its atomic counters took half of the time.
kernel = njit(cache=CACHE, error_model="numpy", _nrt=False)

# A race's number changes whenever the same seed and actions may give it another battle. Terran, version 2: enemy
# medivacs come along; in version 1 they stayed where they started.
SIMULATOR_VERSIONS = {"protoss": 1, "terran": 2, "zerg": 1}

# ---------------------------------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------------------------------

MAP_SIZE = 32.0
LOOPS_PER_SECOND = 16.0
LOOPS_PER_STEP = 8  # the package's step_mul
EPISODE_LIMIT = 200  # env steps, for every map (SMACv2 package)
MOVE_AMOUNT = 2.0  # a move order aims at the point this far away
MIN_MASK_RANGE = 2.0  # the package's min_attack_range
PLAYABLE_HALF = MAP_SIZE / 2
NUM_THREADS = numba.config.NUMBA_NUM_THREADS  # the cores of the machine, or the environment variable of that name
UNITS_WORTH_THREADS = 320  # in all battles together

GROUND, AIR, COLOSSUS_PLANE = 0, 1, 2  # bodies collide within their plane only: colossi step over everybody
SINGLE_TARGET, LINE_SPLASH, DISC_SPLASH = 0, 1, 2

# Line splash of the colossus and disc splash of the baneling (WoL unit catalogue).
LINE_HALF_LENGTH, LINE_HALF_WIDTH = 1.25, 0.15
BEAM_LOOPS = 0.375 * LOOPS_PER_SECOND  # from the end of the wind-up to the damage
DISC_RADIUS = 2.2

SHIELD_REGEN = 2.0 / LOOPS_PER_SECOND  # per loop ...
SHIELD_DELAY = 160  # ... after this many loops without damage
START_ENERGY, MAX_ENERGY = 50.0, 200.0
ENERGY_REGEN = 0.5625 / LOOPS_PER_SECOND
HEAL = 9.0 / LOOPS_PER_SECOND  # health per loop
HEAL_COST = 0.33  # energy per health
HEAL_RANGE = 4.0  # edge to edge
AUTO_HEAL_RANGE, AUTO_HEAL_ENERGY = 6.0, 5.0  # enemy medivacs look for patients by themselves
SCAN_RANGE = 5.0  # an idle enemy notices allies this far away, edge to edge, or within its weapon's range if longer
RANGE_SLOP = 1.0  # during wind-up a target may leave the reach by this much; not for the colossus
DELAY_LOW, DELAY_HIGH = -1.0, 2.0  # loops, uniform, added to every weapon cooldown
MIN_DAMAGE = 0.5  # what armour leaves of any hit
TURN_COSINES = np.cos(np.arange(5) * np.pi / 6)  # by which a blocked unit turns aside
TURN_SINES = np.sin(np.arange(5) * np.pi / 6)


class UnitType(NamedTuple):
    """One unit type in the catalogue's own figures: seconds are data seconds, lengths map cells.

    The last three are not the game's but the SMACv2 package's: its sight table is the catalogue's, its attack mask and
    the divisor of the state's cooldown column are tables of its own.
    """

    name: str
    health: float
    shield: float
    armour: float
    attributes: str
    speed: float
    """Cells per second"""
    radius: float
    separation: float
    """Radius of the body when pushed apart"""
    sight: float
    damage: float = 0.0
    bonus: float = 0.0
    bonus_against: str = "nothing"
    hits: int = 1
    period: float = 0.0
    """Seconds between attacks"""
    reach: float = 0.0
    """Weapon range, edge to edge"""
    wind_up: float = 0.0
    """Seconds from the start of an attack to the hit, or to the missile's launch"""
    missile_speed: float = 0.0
    """Cells per second; 0 hits at once"""
    hit_gap: float = 0.0
    """Seconds from the first to the second hit"""
    hits_air: bool = False
    splash: int = SINGLE_TARGET
    plane: int = GROUND
    acceleration: float = 1000.0
    """Cells per second squared"""
    health_regen: float = 0.0
    """Per second"""
    mask_range: float = 0.0
    """Package: attack is available up to this distance between centres, or up to 2 if that is more"""
    cooldown_divisor: float = 1.0
    """Package: loops by which the state divides the weapon cooldown (the energy, for a medivac)"""


# In the order of the game's unit type ids, by which the package sorts the agents (alphabetical).
# fmt: off
WOL_UNITS = (
    UnitType("baneling", 30, 0, 0, "bio", 2.5, .375, .375, 8, 20, 15, "light", 1, 0, .25, splash=DISC_SPLASH,
             health_regen=.2734, mask_range=.25, cooldown_divisor=1),
    UnitType("colossus", 200, 150, 1, "armored", 2.25, 1, .75, 10, 20, 0, "nothing", 2, 2.2, 6, .083,
             splash=LINE_SPLASH, plane=COLOSSUS_PLANE, mask_range=7, cooldown_divisor=24),
    UnitType("hydralisk", 80, 0, 0, "light bio", 2.25, .625, .5, 9, 12, 0, "nothing", 1, .83, 5, .208, 40,
             hits_air=True, health_regen=.2734, mask_range=5, cooldown_divisor=10),
    UnitType("marauder", 125, 0, 1, "armored bio", 2.25, .5625, .5, 10, 10, 10, "armored", 1, 1.5, 6, 0, 20,
             mask_range=6, cooldown_divisor=25),
    UnitType("marine", 45, 0, 0, "light bio", 2.25, .375, .375, 9, 6, 0, "nothing", 1, .8608, 5, .05,
             hits_air=True, mask_range=5, cooldown_divisor=15),
    UnitType("medivac", 150, 0, 1, "armored", 2.75, .75, .75, 11, plane=AIR, acceleration=2.3125,
             mask_range=4, cooldown_divisor=200),
    UnitType("stalker", 80, 80, 1, "armored", 2.9531, .625, .625, 10, 10, 4, "armored", 1, 1.44, 6, .167, 18.75,
             hits_air=True, mask_range=6, cooldown_divisor=35),
    UnitType("zealot", 100, 50, 1, "light bio", 2.25, .5, .375, 9, 8, 0, "nothing", 2, 1.2, .1, 0,
             hit_gap=.28, mask_range=.1, cooldown_divisor=22),
    UnitType("zergling", 35, 0, 0, "light bio", 2.9531, .375, .375, 8, 5, 0, "nothing", 1, .696, .1, .167,
             health_regen=.2734, mask_range=.1, cooldown_divisor=11),
)
# fmt: on
UNIT_NAMES = tuple(unit.name for unit in WOL_UNITS)
LARGEST_SEPARATION = max(unit.separation for unit in WOL_UNITS)
BANELING, COLOSSUS, HYDRALISK, MARAUDER, MARINE, MEDIVAC, STALKER, ZEALOT, ZERGLING = range(len(UNIT_NAMES))

# Where the ladder's data (Legacy of the Void, build 4.10) differ.
LOTV_CHANGES = {
    "colossus": {"damage": 10, "bonus": 5, "bonus_against": "light", "period": 1.5, "reach": 7},
    "hydralisk": {"health": 90, "period": 0.825},
    "medivac": {"speed": 2.5, "acceleration": 2.25},
    "stalker": {"damage": 13, "bonus": 5, "period": 1.87},
}
LOTV_UNITS = tuple(unit._replace(**LOTV_CHANGES.get(unit.name, {})) for unit in WOL_UNITS)
UNIT_TABLES = {"wol": WOL_UNITS, "lotv": LOTV_UNITS}


class Race(NamedTuple):
    """What the package's sc2_gen_<race> configuration draws teams from."""

    types: tuple
    """Unit types in the order of the observation's three type bits"""
    weights: tuple
    exception: str
    """No whole team of this type; it is the last of `types` ("" for none)"""


RACES = {
    "protoss": Race(("stalker", "zealot", "colossus"), (0.45, 0.45, 0.10), ""),
    "terran": Race(("marine", "marauder", "medivac"), (0.45, 0.45, 0.10), "medivac"),
    "zerg": Race(("zergling", "hydralisk", "baneling"), (0.45, 0.45, 0.10), "baneling"),
}

# fmt: off
TYPE_FIELDS = (
    "health", "shield", "armour", "light", "armored", "bio", "speed", "acceleration", "radius", "separation", "plane",
    "sight", "damage", "bonus_light", "bonus_armored", "hits", "hit_gap", "period", "reach", "wind_up",
    "missile_speed", "hits_air", "splash", "health_regen", "mask_range", "cooldown_divisor", "bit",
)
# fmt: on
TYPE = np.dtype([(name, np.float64) for name in TYPE_FIELDS])


def compile_unit_table(units):
    """Convert catalogue figures to the kernels' units (loops, cells per loop).

    Args: units, a sequence of UnitType. Returns: structured array TYPE (number of types,).
    """
    table = np.zeros(len(units), TYPE)
    for row, unit in zip(table, units, strict=True):
        for name in TYPE_FIELDS:
            if name in UnitType._fields:
                row[name] = getattr(unit, name)
        for name in ("speed", "missile_speed", "health_regen"):
            row[name] = getattr(unit, name) / LOOPS_PER_SECOND
        for name in ("period", "wind_up", "hit_gap"):
            row[name] = getattr(unit, name) * LOOPS_PER_SECOND
        row["acceleration"] = unit.acceleration / LOOPS_PER_SECOND**2
        row["mask_range"] = max(unit.mask_range, MIN_MASK_RANGE)
        for attribute in ("light", "armored", "bio"):
            row[attribute] = attribute in unit.attributes.split()
        for attribute in ("light", "armored"):
            row[f"bonus_{attribute}"] = unit.bonus * (unit.bonus_against == attribute)
        row["bit"] = next(race.types.index(unit.name) for race in RACES.values() if unit.name in race.types)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# What a battle is made of
# ---------------------------------------------------------------------------------------------------------------------

NO_ORDER, MOVE, TARGET = 0, 1, 2
READY, WIND_UP, FLIGHT, BEAM, SECOND_HIT = 0, 1, 2, 3, 4  # stages of an attack; a new order can stop only WIND_UP

UNIT = np.dtype(
    [
        ("type", np.int64),
        ("alive", np.int64),
        ("x", np.float64),
        ("y", np.float64),
        ("health", np.float64),
        ("shield", np.float64),
        ("energy", np.float64),
        ("cooldown", np.float64),  # loops until the weapon is ready; a fraction below 0 is carried to the next attack
        ("calm", np.int64),  # loops since the last damage
        ("speed", np.float64),  # cells per loop reached so far
        ("moving", np.int64),  # did it walk in this loop?
        ("bumped", np.int64),  # into someone who stands firm
        ("side", np.int64),  # which way round it is passing what stands in its way: 1 left, -1 right, 0 nothing there
        ("order", np.int64),
        ("order_x", np.float64),
        ("order_y", np.float64),
        ("target", np.int64),  # unit index of a TARGET order
        ("attack", np.int64),
        ("attack_timer", np.float64),  # loops until the stage ends
        ("attack_target", np.int64),
        ("healed_at", np.int64),  # loop of the last healing: one healer at a time
    ]
)
BATTLE = np.dtype(
    [
        ("random", np.uint64),
        ("step", np.int64),  # env steps since the start
        ("clock", np.int64),  # loops since the start
        ("phase", np.int64),  # the map script looks for idle enemies when clock % 8 == phase
        ("max_reward", np.float64),  # the reward that is scaled to 20
    ]
)


class World(NamedTuple):
    """Everything that changes, and all that a checkpoint needs."""

    units: np.ndarray  # UNIT (E, U)
    battles: np.ndarray  # BATTLE (E,)
    last_actions: np.ndarray  # (E, N), -1 before the first step
    seen: np.ndarray  # (E, M, N): may agent n see enemy m's row? (this and the next two: only with enemy_wipe)
    owner: np.ndarray  # (E, M): the agent that first saw the enemy, -1 for none
    first_row: np.ndarray  # (E, N): the agent's enemy rows below this one are wiped


class Rules(NamedTuple):
    """What stays the same."""

    table: np.ndarray  # TYPE (9,)
    team_types: np.ndarray  # (3,)
    team_weights: np.ndarray  # (3,), cumulative
    exception: int  # unit type that must not fill a team, or -1
    num_agents: int
    num_enemies: int
    has_shields: bool
    is_terran: bool
    first_episode_scale: bool
    enemy_wipe: bool


class Views(NamedTuple):
    """What the agents and the learner get to see."""

    obs: np.ndarray  # (E, N, O) float32
    state: np.ndarray  # (E, S) float32
    mask: np.ndarray  # (E, N, A) bool


class Outcome(NamedTuple):
    """What one step gave."""

    reward: np.ndarray  # (E,) float32
    terminated: np.ndarray  # (E,) bool
    battle_won: np.ndarray  # (E,) bool
    dead_allies: np.ndarray  # (E,) int64
    dead_enemies: np.ndarray  # (E,) int64


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: each battle has its own splitmix64 generator, so it does not depend on its neighbours or on threads
# ---------------------------------------------------------------------------------------------------------------------

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFT_30, SHIFT_27, SHIFT_31, SHIFT_11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@kernel
def mix_bits(z):
    """Finaliser of splitmix64: a bijection of 64-bit words that scatters neighbouring ones."""
    z = (z ^ (z >> SHIFT_30)) * MIX_1
    z = (z ^ (z >> SHIFT_27)) * MIX_2
    return z ^ (z >> SHIFT_31)


@kernel
def uniform(battle):
    """Draw from U[0, 1)."""
    battle.random += GOLDEN
    return np.float64(mix_bits(battle.random) >> SHIFT_11) * (1.0 / 9007199254740992.0)


@kernel
def seed_battles(battles, seed):
    """Seed battle i from (seed, i)."""
    for e in range(len(battles)):
        battles[e].random = mix_bits(mix_bits(seed + GOLDEN) + np.uint64(e) * GOLDEN)


# ---------------------------------------------------------------------------------------------------------------------
# The start of a battle
# ---------------------------------------------------------------------------------------------------------------------


@allocating_kernel
def draw_team(battle, rules, types):
    """Fill `types` (n,) with independent draws; again, if all are the exception (SMACv2 package, weighted_teams)."""
    if len(types) == 0:
        return
    while True:
        for i in range(len(types)):
            u = uniform(battle)
            k = 0
            while k < 2 and u >= rules.team_weights[k]:
                k += 1
            types[i] = rules.team_types[k]
        if not (types == rules.exception).all():
            return


@allocating_kernel
def draw_battle(battle, rules, types, points):
    """Draw both teams and where they ask to stand (SMACv2 package, weighted_teams and surrounded_and_reflect).

    Fills types (U,) and points (U, 2); enemies get the allies' types, surplus enemies are drawn on their own.
    """
    N, M = rules.num_agents, rules.num_enemies
    draw_team(battle, rules, types[:N])
    shared = min(N, M)
    types[N : N + shared] = types[:shared]
    draw_team(battle, rules, types[N + shared :])
    half = MAP_SIZE / 2
    if uniform(battle) <= 0.5:  # reflect: allies anywhere in the west, their mirror images in the east
        for i in range(N):
            points[i, 0] = uniform(battle) * (half - 1)
            points[i, 1] = uniform(battle) * MAP_SIZE
        for j in range(M):
            if j < N:
                points[N + j, 0] = MAP_SIZE - points[j, 0]
                points[N + j, 1] = points[j, 1]
            else:
                points[N + j, 0] = half + uniform(battle) * half
                points[N + j, 1] = uniform(battle) * MAP_SIZE
    else:  # surrounded: allies in the centre, enemies in one to four groups on the diagonals
        points[:N] = half
        groups = 1 + int(uniform(battle) * 4)
        sizes = np.zeros(4, np.int64)
        for _ in range(M):
            sizes[int(uniform(battle) * groups)] += 1
        corners = np.arange(4)
        j = N
        for g in range(groups):
            pick = g + int(uniform(battle) * (4 - g))
            corner = corners[pick]
            corners[pick] = corners[g]
            east, north = corner // 2, corner % 2
            t = uniform(battle)
            x = t * (half + (2 if east else -2)) + (1 - t) * MAP_SIZE * east
            y = t * (half + (2 if north else -2)) + (1 - t) * MAP_SIZE * north
            for _ in range(sizes[g]):
                points[j, 0] = x
                points[j, 1] = y
                j += 1


@kernel
def clamp(value, margin):
    """Keep a coordinate `margin` inside the map."""
    return min(max(value, margin), MAP_SIZE - margin)


@kernel
def unpack_points(table, types, points):
    """Move each unit in turn to the free place nearest to its point, searched on rings a quarter cell apart."""
    for i in range(len(types)):
        me = table[types[i]]
        x0, y0 = points[i]
        for ring in range(100):
            placed = False
            spots = max(8 * ring, 1)
            for k in range(spots):
                angle = 2 * np.pi * k / spots
                x = clamp(x0 + 0.25 * ring * np.cos(angle), me.radius)
                y = clamp(y0 + 0.25 * ring * np.sin(angle), me.radius)
                placed = True
                for j in range(i):
                    other = table[types[j]]
                    if other.plane == me.plane:
                        gap = me.separation + other.separation
                        if (x - points[j, 0]) ** 2 + (y - points[j, 1]) ** 2 < gap * gap:
                            placed = False
                            break
                if placed:
                    points[i, 0] = x
                    points[i, 1] = y
                    break
            if placed:
                break
        points[i, 0] = clamp(points[i, 0], me.radius)
        points[i, 1] = clamp(points[i, 1], me.radius)


@kernel
def place_unit(unit, kind, x, y, health, shield, cooldown, energy):
    """Set one unit without order; health 0 means dead."""
    unit.type = kind
    unit.alive = 1 if health > 0 else 0
    unit.x = x
    unit.y = y
    unit.health = health
    unit.shield = shield
    unit.energy = energy
    unit.cooldown = cooldown
    unit.calm = SHIELD_DELAY
    unit.speed = 0.0
    unit.moving = 0
    unit.bumped = 0
    unit.side = 0
    unit.order = NO_ORDER
    unit.order_x = x
    unit.order_y = y
    unit.target = -1
    unit.attack = READY
    unit.attack_timer = 0.0
    unit.attack_target = -1
    unit.healed_at = -1


@kernel
def clear_battle(e, world):
    """Set clocks and memories of battle e to those of a battle that has just begun."""
    battle = world.battles[e]
    battle.step = 0
    battle.clock = 0
    battle.phase = 0
    world.last_actions[e] = -1
    world.seen[e] = 0
    world.owner[e] = -1
    world.first_row[e] = 0


@allocating_kernel
def spawn_battle(e, world, rules):
    """Start a new battle e. Agents are sorted by (type, x, y), enemies keep their order (SMACv2 package)."""
    units, battle, table = world.units[e], world.battles[e], rules.table
    N = rules.num_agents
    types = np.empty(len(units), np.int64)
    points = np.empty((len(units), 2))
    draw_battle(battle, rules, types, points)
    unpack_points(table, types, points)
    for i in range(N):  # insertion sort
        kind = types[i]
        x, y = points[i]
        k = i
        while k > 0 and (
            types[k - 1] > kind
            or (types[k - 1] == kind and (points[k - 1, 0] > x or (points[k - 1, 0] == x and points[k - 1, 1] > y)))
        ):
            types[k] = types[k - 1]
            points[k] = points[k - 1]
            k -= 1
        types[k] = kind
        points[k, 0] = x
        points[k, 1] = y
    for i in range(len(units)):
        me = table[types[i]]
        energy = START_ENERGY if types[i] == MEDIVAC else 0.0
        place_unit(units[i], types[i], points[i, 0], points[i, 1], me.health, me.shield, 0.0, energy)
    clear_battle(e, world)
    battle.phase = int(uniform(battle) * LOOPS_PER_STEP)
    if rules.enemy_wipe:
        update_wipe(e, world, rules)


@kernel
def first_max_reward(units, rules):
    """The package's reward scale as its first battle fixes it: win, kills, and all enemies' health and shields."""
    total = 200.0 + 10.0 * rules.num_enemies
    for j in range(rules.num_agents, len(units)):
        total += rules.table[units[j].type].health + rules.table[units[j].type].shield
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The battle: one loop of 1/16 second
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def distance(a, b):
    """Distance of two units' centres."""
    return np.sqrt((a.x - b.x) ** 2 + (a.y - b.y) ** 2)


@kernel
def can_attack(table, attacker, target):
    """Has the attacker a weapon that can be aimed at the target? (WoL unit catalogue)"""
    me = table[attacker.type]
    return me.damage > 0 and (me.hits_air > 0 or table[target.type].plane != AIR)


@kernel
def hit(table, kind, target):
    """One hit of a `kind`'s weapon: shields first, then health behind the armour (WoL unit catalogue)."""
    weapon, body = table[kind], table[target.type]
    damage = weapon.damage + weapon.bonus_light * body.light + weapon.bonus_armored * body.armored
    target.calm = 0
    absorbed = min(target.shield, damage)
    target.shield -= absorbed
    damage -= absorbed
    if damage > 0:
        target.health = max(target.health - max(damage - body.armour, MIN_DAMAGE), 0.0)


@kernel
def other_side(i, num_units, N):
    """Range of the unit indices that fight unit i."""
    return (N, num_units) if i < N else (0, N)


@kernel
def hit_line(units, i, table, N):
    """Colossus: two sweeps along a line through the target, across the line of fire, over all ground enemies on it."""
    me, target = units[i], units[units[i].attack_target]
    away = max(distance(me, target), 1e-9)
    fire_x, fire_y = (target.x - me.x) / away, (target.y - me.y) / away
    low, high = other_side(i, len(units), N)
    for k in range(low, high):
        victim = units[k]
        body = table[victim.type]
        if victim.alive and body.plane != AIR:
            dx, dy = victim.x - target.x, victim.y - target.y
            across = abs(dx * fire_y - dy * fire_x)
            along = abs(dx * fire_x + dy * fire_y)
            if across <= LINE_HALF_LENGTH + body.radius and along <= LINE_HALF_WIDTH + body.radius:
                for _ in range(int(table[me.type].hits)):
                    hit(table, me.type, victim)


@kernel
def hit_disc(units, i, table, N):
    """Baneling: one hit for every ground enemy that the disc around it touches."""
    low, high = other_side(i, len(units), N)
    for k in range(low, high):
        victim = units[k]
        body = table[victim.type]
        if victim.alive and body.plane != AIR and distance(units[i], victim) <= DISC_RADIUS + body.radius:
            hit(table, units[i].type, victim)


@kernel
def release(units, i, table):
    """The end of unit i's wind-up: hit, launch the missile, start the beam, or blow up."""
    me = units[i]
    target, weapon = units[me.attack_target], table[me.type]
    me.attack = READY
    if weapon.splash == LINE_SPLASH:
        me.attack = BEAM
        me.attack_timer = BEAM_LOOPS
    elif weapon.splash == DISC_SPLASH:
        me.health = 0.0  # its death does the rest
    elif weapon.missile_speed > 0:
        me.attack = FLIGHT
        me.attack_timer = distance(me, target) / weapon.missile_speed
    else:
        hit(table, me.type, target)
        if weapon.hits > 1:
            me.attack = SECOND_HIT
            me.attack_timer = weapon.hit_gap


@kernel
def break_off(unit):
    """Stop an attack that is still winding up; the weapon is ready again."""
    if unit.attack == WIND_UP:
        unit.attack = READY
        unit.cooldown = 0.0


@kernel
def continue_attack(units, i, table, N):
    """Advance unit i's attack by one loop."""
    me = units[i]
    target = units[me.attack_target]
    if (not me.alive and me.attack != FLIGHT) or (not target.alive and me.attack != BEAM):
        break_off(me)
        me.attack = READY
        return
    me.attack_timer -= 1.0
    if me.attack == WIND_UP:
        weapon = table[me.type]
        slop = 0.0 if weapon.splash == LINE_SPLASH else RANGE_SLOP
        if distance(me, target) > weapon.reach + weapon.radius + table[target.type].radius + slop:
            break_off(me)
        elif me.attack_timer <= 0:
            release(units, i, table)
    elif me.attack_timer <= 0:
        if me.attack == BEAM:
            hit_line(units, i, table, N)
        else:
            hit(table, me.type, target)
        me.attack = READY


@kernel
def stands_firm(units, i, j, N):
    """Does unit j stand in i's way so that i cannot shove it? Friends without orders give way."""
    b = units[j]
    return not b.moving and ((i < N) != (j < N) or b.order == TARGET)


@kernel
def find_bodies(units, i, table, N, stride, bodies):
    """Write to `bodies` who stands firm within a stride of touching unit i; returns their number."""
    me, body = units[i], table[units[i].type]
    far = body.separation + LARGEST_SEPARATION + stride
    count = 0
    for j in range(len(units)):
        b = units[j]
        dx, dy = b.x - me.x, b.y - me.y
        square = dx * dx + dy * dy
        if square < far * far and j != i and b.alive and stands_firm(units, i, j, N):
            other = table[b.type]
            if other.plane == body.plane and square < (body.separation + other.separation + stride) ** 2:
                bodies[count] = j
                count += 1
    return count


@kernel
def is_free(units, i, table, bodies, count, x, y):
    """Would unit i at (x, y) be no deeper in any of the first `count` bodies than it is now?"""
    me = units[i]
    for k in range(count):
        b = units[bodies[k]]
        gap = table[me.type].separation + table[b.type].separation
        square = (b.x - x) ** 2 + (b.y - y) ** 2
        if square < gap * gap and square < (b.x - me.x) ** 2 + (b.y - me.y) ** 2:
            return False
    return True


@kernel
def walk(units, i, table, N, bodies, x, y, stop_at):
    """Walk towards (x, y) until `stop_at` away from it, around what stands in the way; True on arrival.

    A unit that has bumped into somebody turns by 30 to 120 degrees, to the side where it has to turn less, and keeps
    to that side until the straight way is free again. `bodies` (U,) is scratch space.
    """
    me = units[i]
    dx, dy = x - me.x, y - me.y
    away = np.sqrt(dx * dx + dy * dy)
    left = away - stop_at
    if left <= 0:
        me.speed = 0.0
        return True
    body = table[me.type]
    me.speed = min(me.speed + body.acceleration, body.speed)
    stride = min(me.speed, left)
    dx, dy = dx / away * stride, dy / away * stride
    count = find_bodies(units, i, table, N, stride, bodies) if me.bumped or me.side != 0 else 0
    me.bumped = 0
    if is_free(units, i, table, bodies, count, me.x + dx, me.y + dy):
        me.side = 0
        me.moving = 1
        me.x += dx
        me.y += dy
        if stride == left:
            me.speed = 0.0
            return True
        return False
    for turn in range(1, 5):
        cosine, sine = TURN_COSINES[turn], TURN_SINES[turn]
        for side in (1, -1):
            if me.side != -side:
                turned_x, turned_y = dx * cosine - dy * sine * side, dx * sine * side + dy * cosine
                if is_free(units, i, table, bodies, count, me.x + turned_x, me.y + turned_y):
                    me.side = side
                    me.moving = 1
                    me.x += turned_x
                    me.y += turned_y
                    return False
    me.side = 0
    return False


@kernel
def heal(units, i, table, N, bodies, clock):
    """Medivac: stay within range of the patient and restore health for energy, one healer per patient and loop."""
    me, patient = units[i], units[units[i].target]
    body = table[patient.type]
    reach = HEAL_RANGE + table[me.type].radius + body.radius
    if distance(me, patient) > reach:
        walk(units, i, table, N, bodies, patient.x, patient.y, reach)
        return
    me.speed = 0.0
    if patient.healed_at < clock and 0 < patient.health < body.health:
        amount = min(HEAL, body.health - patient.health, me.energy / HEAL_COST)
        if amount > 0:
            patient.health += amount
            patient.healed_at = clock
            me.energy = max(me.energy - amount * HEAL_COST, 0.0)


@kernel
def obey(units, i, table, battle, N, bodies):
    """Let unit i follow its order for one loop."""
    me = units[i]
    me.moving = 0
    if me.attack == WIND_UP:
        return
    if me.order == MOVE:
        if walk(units, i, table, N, bodies, me.order_x, me.order_y, 0.0):
            me.order = NO_ORDER
        return
    if me.order == TARGET and not units[me.target].alive:
        me.order = NO_ORDER
    if me.order == NO_ORDER:
        me.speed = 0.0
        return
    target = units[me.target]
    weapon = table[me.type]
    if me.type == MEDIVAC:
        heal(units, i, table, N, bodies, battle.clock)
        return
    reach = weapon.reach + weapon.radius + table[target.type].radius
    if distance(me, target) > reach + 1e-9:
        walk(units, i, table, N, bodies, target.x, target.y, reach)
        return
    me.speed = 0.0
    if me.cooldown <= 0 and me.attack == READY:
        me.cooldown += weapon.period + DELAY_LOW + (DELAY_HIGH - DELAY_LOW) * uniform(battle)
        me.attack_target = me.target
        me.attack = WIND_UP
        me.attack_timer = weapon.wind_up
        if weapon.wind_up == 0:
            release(units, i, table)


@kernel
def find_patient(units, i, table, N):
    """The hurt bio friend near enemy medivac i with the lowest health fraction, then the nearest; -1 for none."""
    best, best_fraction, best_away = -1, 1.0, np.inf
    for k in range(N, len(units)):
        friend = units[k]
        body = table[friend.type]
        if friend.alive and body.bio > 0 and friend.health < body.health:
            away = distance(units[i], friend)
            taken = False
            for m in range(N, len(units)):
                medic = units[m]
                if m != i and medic.alive and medic.type == MEDIVAC and medic.order == TARGET and medic.target == k:
                    taken = True
            fraction = friend.health / body.health
            if (
                not taken
                and away <= AUTO_HEAL_RANGE + table[MEDIVAC].radius + body.radius
                and (fraction < best_fraction or (fraction == best_fraction and away < best_away))
            ):
                best, best_fraction, best_away = k, fraction, away
    return best


@kernel
def command_enemies(units, table, battle, N):
    """Orders of the enemies that have none.

    The map script looks every half second and sends each idle enemy at the nearest ally, whatever that is; an order
    its weapon cannot carry out (a marauder's on a medivac) is refused; a medivac moves there. In between, the game's
    own reflex attacks what comes near, armed units first, and enemy medivacs heal, whether they move or not.
    """
    scripted = battle.clock % LOOPS_PER_STEP == battle.phase
    for j in range(N, len(units)):
        me = units[j]
        if not me.alive:
            continue
        if me.type == MEDIVAC:
            if me.order == TARGET:
                patient = units[me.target]
                if not patient.alive or patient.health >= table[patient.type].health:
                    me.order = NO_ORDER
            if me.order != TARGET and me.energy >= AUTO_HEAL_ENERGY:
                patient_index = find_patient(units, j, table, N)
                if patient_index >= 0:
                    me.order = TARGET
                    me.target = patient_index
            if me.order != NO_ORDER or not scripted:
                continue
        elif me.order == TARGET and units[me.target].alive:
            continue
        me.order = NO_ORDER
        nearest, nearest_away = -1, np.inf
        noticed, noticed_away, noticed_armed = -1, np.inf, False
        scan = max(SCAN_RANGE, table[me.type].reach) + table[me.type].radius
        for i in range(N):
            ally = units[i]
            if ally.alive:
                away = distance(me, ally)
                if away < nearest_away:
                    nearest, nearest_away = i, away
                if can_attack(table, me, ally) and away <= scan + table[ally.type].radius:
                    armed = ally.type != MEDIVAC
                    if (armed and not noticed_armed) or (armed == noticed_armed and away < noticed_away):
                        noticed, noticed_away, noticed_armed = i, away, armed
        if scripted and nearest >= 0 and can_attack(table, me, units[nearest]):
            noticed = nearest
        if noticed >= 0:
            me.order = TARGET
            me.target = noticed
        elif me.type == MEDIVAC and nearest >= 0:
            me.order = MOVE
            me.order_x = units[nearest].x
            me.order_y = units[nearest].y


@kernel
def push_apart(units, table, N):
    """Separate overlapping bodies of a plane, one sweep over all pairs; then hold everybody inside the border.

    Two walkers share the way, and a friend without orders gives way as much; but who stands in a fight, or fights for
    the other side, is not shoved.
    """
    for i in range(len(units)):
        a = units[i]
        if not a.alive:
            continue
        body = table[a.type]
        far = body.separation + LARGEST_SEPARATION
        for j in range(i + 1, len(units)):
            b = units[j]
            dx, dy = b.x - a.x, b.y - a.y
            square = dx * dx + dy * dy
            if square >= far * far or not b.alive:
                continue
            gap = body.separation + table[b.type].separation
            if square >= gap * gap or table[b.type].plane != body.plane:
                continue
            away = np.sqrt(square)
            if away < 1e-9:
                dx, dy, away = 1e-9, 0.0, 1e-9
            share = 0.5  # of the way that `a` takes
            if a.moving != b.moving and body.plane != AIR:
                if a.moving and stands_firm(units, i, j, N):
                    share = 1.0
                    a.bumped = 1
                elif b.moving and stands_firm(units, j, i, N):
                    share = 0.0
                    b.bumped = 1
            push = (gap - away) / away
            a.x -= dx * push * share
            a.y -= dy * push * share
            b.x += dx * push * (1.0 - share)
            b.y += dy * push * (1.0 - share)
    for i in range(len(units)):
        unit = units[i]
        radius = table[unit.type].radius
        unit.x = clamp(unit.x, radius)
        unit.y = clamp(unit.y, radius)


@kernel
def bury_dead(units, table, N):
    """Take units without health off the field; a baneling's death hurts others, so go on until nobody dies."""
    again = True
    while again:
        again = False
        for i in range(len(units)):
            unit = units[i]
            if unit.alive and unit.health <= 0:
                unit.alive = 0
                unit.shield = 0.0
                unit.order = NO_ORDER
                if table[unit.type].splash == DISC_SPLASH:
                    hit_disc(units, i, table, N)
                    again = True


@allocating_kernel
def play_loop(units, table, battle, N):
    """Advance a battle by one loop. Who dies in it still acts in it: both sides can fall together."""
    for i in range(len(units)):
        unit = units[i]
        if unit.alive:
            body = table[unit.type]
            unit.cooldown = unit.cooldown - 1.0 if unit.cooldown > 0 else 0.0
            unit.calm += 1
            unit.health = min(unit.health + body.health_regen, body.health)
            if body.shield > 0 and unit.calm > SHIELD_DELAY:
                unit.shield = min(unit.shield + SHIELD_REGEN, body.shield)
            if unit.type == MEDIVAC:
                unit.energy = min(unit.energy + ENERGY_REGEN, MAX_ENERGY)
    for i in range(len(units)):  # only now: regeneration after a deadly hit would raise the dead
        if units[i].attack != READY:
            continue_attack(units, i, table, N)
    command_enemies(units, table, battle, N)
    bodies = np.empty(len(units), np.int64)
    for i in range(len(units)):
        if units[i].alive:
            obey(units, i, table, battle, N, bodies)
    push_apart(units, table, N)
    bury_dead(units, table, N)
    battle.clock += 1


# ---------------------------------------------------------------------------------------------------------------------
# Actions, observations, states (SMACv2 package)
# ---------------------------------------------------------------------------------------------------------------------

NO_OP, STOP, NORTH, SOUTH, EAST, WEST, FIRST_TARGET = range(7)


@kernel
def is_available(units, i, action, table, N, M):
    """May agent i take this action? Distances are between centres and ignore whether the weapon can hit."""
    me = units[i]
    if not me.alive:
        return action == NO_OP
    if action < FIRST_TARGET:
        # The package tests the map cell one step of 1 away, rounding towards zero: south and west never leave the map.
        if action == NORTH:
            return me.y + 1 < MAP_SIZE
        if action == EAST:
            return me.x + 1 < MAP_SIZE
        return action != NO_OP
    j = action - FIRST_TARGET
    if me.type == MEDIVAC:  # heals the ally of this number
        if j >= N or units[j].type == MEDIVAC:
            return False
    else:
        if j >= M:
            return False
        j += N
    return units[j].alive and distance(me, units[j]) <= table[me.type].mask_range


@kernel
def give_order(units, i, action, rules):
    """Turn an available action of agent i into an order, which lasts until the next one."""
    me = units[i]
    if action == NO_OP:
        return
    if action >= FIRST_TARGET:
        j = action - FIRST_TARGET + (0 if me.type == MEDIVAC else rules.num_agents)
        if me.type != MEDIVAC and not can_attack(rules.table, me, units[j]):
            return  # the game refuses the order, and the unit goes on as before
        if me.attack_target != j:
            break_off(me)
        me.order = TARGET
        me.target = j
        return
    break_off(me)
    me.order = NO_ORDER
    if action != STOP:
        me.order = MOVE
        radius = rules.table[me.type].radius
        me.order_x = clamp(me.x + MOVE_AMOUNT * ((action == EAST) - (action == WEST)), radius)
        me.order_y = clamp(me.y + MOVE_AMOUNT * ((action == NORTH) - (action == SOUTH)), radius)


@allocating_kernel
def update_wipe(e, world, rules):
    """Bookkeeping of the package's row wipe (since June 2023), before each observation.

    Agents look around in random order. Whoever first sees an enemy, dead or alive, shows it to everybody; an enemy not
    yet shown erases the rows of all enemies numbered below it. The dead are forgotten at each step.
    """
    units, battle = world.units[e], world.battles[e]
    seen, owner, first_row = world.seen[e], world.owner[e], world.first_row[e]
    N, M = rules.num_agents, rules.num_enemies
    for j in range(M):
        if not units[N + j].alive or (owner[j] >= 0 and not units[owner[j]].alive):
            owner[j] = -1
            seen[j] = 0
    for i in range(N):
        if not units[i].alive:
            seen[:, i] = 0
    order = np.arange(N)
    for k in range(N - 1, 0, -1):
        pick = int(uniform(battle) * (k + 1))
        order[k], order[pick] = order[pick], order[k]
    for i in order:
        first_row[i] = 0
        if not units[i].alive:
            continue
        sight = rules.table[units[i].type].sight
        for j in range(M):
            if owner[j] < 0 and distance(units[i], units[N + j]) < sight:
                owner[j] = i
                seen[j] = 1
            if not seen[j, i]:
                first_row[i] = j + 1


@kernel
def write_features(row, k, unit, body, has_shields):
    """Write shield (protoss) and type bits at row[k], which is zero."""
    if has_shields:
        row[k] = unit.shield / body.shield
        k += 1
    row[k + int(body.bit)] = 1.0


@kernel
def write_other(row, k, me, other, column_0, table, has_shields):
    """Write an enemy or ally at row[k]: column 0, distance, direction, health, shield, type; nothing if out of sight.

    (Scalars and offsets instead of `rules` and slices, whose reference counts cost as much as the row.)
    """
    sight, away = table[me.type].sight, distance(me, other)
    if other.alive and away < sight:
        body = table[other.type]
        row[k] = column_0
        row[k + 1] = away / sight
        row[k + 2] = (other.x - me.x) / sight
        row[k + 3] = (other.y - me.y) / sight
        row[k + 4] = other.health / body.health
        write_features(row, k + 5, other, body, has_shields)


@kernel
def write_views(units, first_row, last_actions, rules, obs, state, mask):
    """Write all agents' observations (N, O) and masks (N, A) and the state (S,) of one battle."""
    N, M, table = rules.num_agents, rules.num_enemies, rules.table
    shields = 1 if rules.has_shields else 0
    width = 8 + shields
    obs[:] = 0.0
    for i in range(N):
        me = units[i]
        for action in range(mask.shape[1]):
            mask[i, action] = is_available(units, i, action, table, N, M)
        if not me.alive:
            continue
        row = obs[i]
        for k in range(4):
            row[k] = mask[i, NORTH + k]
        k = 4
        for j in range(M):
            if j >= first_row[i]:
                # For a medivac this column says that the ally of the same number can be healed, as in the package.
                write_other(row, k, me, units[N + j], mask[i, FIRST_TARGET + j], table, rules.has_shields)
            k += width
        for j in range(N):
            if j != i:
                write_other(row, k, me, units[j], 1.0, table, rules.has_shields)
                k += width
        body = table[me.type]
        row[k] = me.health / body.health
        if rules.has_shields:
            row[k + 1] = me.shield / body.shield
        row[k + 1 + shields] = me.x / MAP_SIZE
        row[k + 2 + shields] = me.y / MAP_SIZE
        row[k + 3 + shields + int(body.bit)] = 1.0

    state[:] = 0.0
    k = 0
    for i in range(N + M):
        unit = units[i]
        body = table[unit.type]
        position = k + (2 if i < N else 1)
        if unit.alive:
            state[k] = unit.health / body.health
            if i < N:
                loops_or_energy = unit.energy if unit.type == MEDIVAC else max(unit.cooldown, 0.0)
                state[k + 1] = loops_or_energy / body.cooldown_divisor
            state[position] = (unit.x - PLAYABLE_HALF) / MAP_SIZE
            state[position + 1] = (unit.y - PLAYABLE_HALF) / MAP_SIZE
            write_features(state, position + 2, unit, body, rules.has_shields)
        k = position + 5 + shields
    for i in range(N):
        if last_actions[i] >= 0:
            state[k + last_actions[i]] = 1.0
        k += mask.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# One environment step
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def count_alive(units, low, high, fighters_only):
    """Living units among low..high-1, without medivacs if `fighters_only`."""
    count = 0
    for i in range(low, high):
        if units[i].alive and not (fighters_only and units[i].type == MEDIVAC):
            count += 1
    return count


@kernel
def enemy_pool(units, N):
    """Health and shields of the enemies that live."""
    total = 0.0
    for j in range(N, len(units)):
        if units[j].alive:
            total += units[j].health + units[j].shield
    return total


@kernel
def judge(units, rules):
    """(battle over, battle won) after a step, in the package's order of checks: loss, win, draw."""
    N, U = rules.num_agents, len(units)
    allies, enemies = count_alive(units, 0, N, False), count_alive(units, N, U, False)
    if (allies == 0 and enemies > 0) or (rules.is_terran and count_alive(units, 0, N, True) == 0):
        return True, False
    if (allies > 0 and enemies == 0) or (rules.is_terran and count_alive(units, N, U, True) == 0):
        return True, True
    return allies == 0 and enemies == 0, False


@allocating_kernel
def step_battle(e, world, rules, actions, new, final, outcome):
    """Play one env step of battle e; where it ends, write the `final` views and start the next battle."""
    units, battle = world.units[e], world.battles[e]
    N, U = rules.num_agents, len(units)
    pool, enemies = enemy_pool(units, N), count_alive(units, N, U, False)
    for i in range(N):
        give_order(units, i, actions[e, i], rules)
    for _ in range(LOOPS_PER_STEP):
        play_loop(units, rules.table, battle, N)
    world.last_actions[e] = actions[e]
    battle.step += 1

    enemies_left = count_alive(units, N, U, False)
    # Enemy healing and regeneration count against the step, own losses never; the sum is clamped once.
    reward = max(pool - enemy_pool(units, N) + 10.0 * (enemies - enemies_left), 0.0)
    over, won = judge(units, rules)
    if won:
        reward += 200.0
    outcome.reward[e] = reward / (battle.max_reward / 20.0)
    outcome.terminated[e] = over or battle.step >= EPISODE_LIMIT
    outcome.battle_won[e] = won
    outcome.dead_allies[e] = N - count_alive(units, 0, N, False)
    outcome.dead_enemies[e] = U - N - enemies_left
    if rules.enemy_wipe:
        update_wipe(e, world, rules)
    if outcome.terminated[e]:
        write_views(
            units, world.first_row[e], world.last_actions[e], rules, final.obs[e], final.state[e], final.mask[e]
        )
        spawn_battle(e, world, rules)
    write_views(units, world.first_row[e], world.last_actions[e], rules, new.obs[e], new.state[e], new.mask[e])


@kernel
def first_unavailable(world, rules, actions, num_actions):
    """Flat index into actions (E, N) of the first one that is not available, or -1."""
    N, M, table = rules.num_agents, rules.num_enemies, rules.table
    for e in range(len(actions)):
        units = world.units[e]
        for i in range(N):
            action = actions[e, i]
            if not (0 <= action < num_actions and is_available(units, i, action, table, N, M)):
                return e * N + i
    return -1


@njit(cache=CACHE, error_model="numpy", nogil=True)
def step_battles(first, last, world, rules, actions, new, final, outcome):
    """Step battles first..last-1. Releases Python's lock, so that threads can share the battles."""
    for e in range(first, last):
        step_battle(e, world, rules, actions, new, final, outcome)


@allocating_kernel
def spawn_all(world, rules, set_scale):
    """Start a new battle everywhere; `set_scale` lets the first one fix the reward scale."""
    for e in range(len(world.battles)):
        spawn_battle(e, world, rules)
        if set_scale and rules.first_episode_scale:
            world.battles[e].max_reward = first_max_reward(world.units[e], rules)


@kernel
def view_all(world, rules, new):
    """Write every battle's views without touching the battles."""
    for e in range(len(world.battles)):
        write_views(
            world.units[e],
            world.first_row[e],
            world.last_actions[e],
            rules,
            new.obs[e],
            new.state[e],
            new.mask[e],
        )


@kernel
def load_units(e, world, types, numbers):
    """Put the given units, types (U,) and numbers (U, 6), in the place of battle e's."""
    for i in range(len(types)):
        x, y, health, shield, cooldown, energy = numbers[i]
        place_unit(world.units[e, i], types[i], x, y, health, shield, cooldown, energy)
    clear_battle(e, world)


# ---------------------------------------------------------------------------------------------------------------------
# The batched environment
# ---------------------------------------------------------------------------------------------------------------------


def parse_map_name(map_name):
    """Split e.g. "protoss_10_vs_11" into (race, number of agents, number of enemies).

    Errors: ValueError for another form, an unknown race, or a team that is empty or larger than 99.
    """
    parts = re.fullmatch(r"([a-z]+)_([1-9]\d?)_vs_([1-9]\d?)", map_name) if isinstance(map_name, str) else None
    if parts is None or parts[1] not in RACES:
        raise ValueError(
            f"unknown map {map_name!r}: expected <race>_<agents>_vs_<enemies> with race protoss, terran or zerg "
            f"and 1 to 99 units a side, such as protoss_5_vs_5 or zerg_10_vs_11."
        )
    return parts[1], int(parts[2]), int(parts[3])


def expected_max_reward(race, num_agents, num_enemies, unit_table="wol"):
    """Expected largest raw return of a battle: 200 for the win, 10 a kill, and all enemies' health and shields.

    Exact, including the redrawing of teams made of the exception alone: with w its weight, h its health and m the mean
    health of an unrestricted draw, a unit of an n-team has mean (m - w^n h) / (1 - w^n); at n = 5 that differs from m
    by less than 0.001 %. Source: SMACv2 package's max_reward, which is this sum for one drawn team.
    """
    types, weights, exception = RACES[race]
    units = {unit.name: unit for unit in UNIT_TABLES[unit_table]}
    health = [units[name].health + units[name].shield for name in types]
    mean = sum(w * h for w, h in zip(weights, health, strict=True))

    def team_sum(team_size, counted):
        if not exception:
            return counted * mean
        all_excepted = weights[-1] ** team_size
        return counted * (mean - all_excepted * health[-1]) / (1 - all_excepted)

    total = 200.0 + 10.0 * num_enemies + team_sum(num_agents, min(num_agents, num_enemies))
    surplus = num_enemies - num_agents
    return total + (team_sum(surplus, surplus) if surplus > 0 else 0.0)


def check_choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}.")
    return value


def check_integer(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected an integer from {low} to {high}.")
    return int(value)


def check_flag(name, value):
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}, expected True or False.")
    return bool(value)


def check_actions(actions, shape):
    """The actions as an array; ValueError unless they are integers of this shape."""
    actions = np.asarray(actions)
    if actions.shape != shape or actions.dtype.kind not in "iu":
        raise ValueError(f"actions are {actions.dtype} {actions.shape}, expected integers {shape}")
    return actions


def refuse_unknown(game, options, environment):
    """ValueError if there are any options: those that the environment's constructor has not taken for its own."""
    if options:
        *others, last = environment.__init__.__kwdefaults__
        raise ValueError(f"{game} has no option {next(iter(options))}; it has {', '.join(others)} and {last}.")


def is_decided(env, state):
    """Has a battle ended because a side had no fighter left, rather than by the clock?

    Args: env, the SMACv2Sim; state (S,), its last one, from final_info. Returns: bool.
    """
    width = 7 + int(env.race == "protoss")
    allies, enemies = np.split(
        state[: env.num_agents * width + env.num_enemies * (width - 1)], [env.num_agents * width]
    )
    fighters = slice(-3, -1 if env.race == "terran" else None)  # of the type columns, whose last one is the medivac's
    return not (allies.reshape(-1, width)[:, fighters].any() and enemies.reshape(-1, width - 1)[:, fighters].any())


class SMACv2Sim:
    """`num_envs` SMACv2 battles on one map, stepped together; the interface is that of envs/__init__.py.

    The 200-step limit is an ordinary terminal, as in the package's standard configuration, so `truncated` is always
    False.

    Args:
        map_name: "<race>_<agents>_vs_<enemies>", see parse_map_name.
        num_envs: number of battles E, at least 1.
        seed: non-negative int below 2**63. Battle i depends on (seed, i) and its actions alone, not on E or threads.
        reward_scale: "expected", one constant for the map, `expected_max_reward`; or "first_episode", the package's
            way, one constant per battle slot taken from the enemy team of its first battle.
        enemy_wipe: copy the package's erasing of enemy rows, see update_wipe (in the package since June 2023).
        unit_table: "wol", the data the package's map uses, or "lotv", the ladder's.

    Attributes beside the interface's: map_name, race, num_enemies, max_reward ((E,) float64: the raw return that is
    scaled to 20).

    Errors: ValueError, one sentence, for any argument out of range.
    """

    backend, episode_limit, restarts = "sim", EPISODE_LIMIT, 0

    def __init__(
        self, map_name, num_envs, seed=0, *, reward_scale="expected", enemy_wipe=False, unit_table="wol", **unknown
    ):
        refuse_unknown("The simulator", unknown, SMACv2Sim)
        if numba.config.DISABLE_JIT:
            raise ValueError("The simulator is nothing without numba's compiler: unset NUMBA_DISABLE_JIT.")
        self.name = self.map_name = map_name
        self.race, self.num_agents, self.num_enemies = parse_map_name(map_name)
        self.num_envs = check_integer("num_envs", num_envs, 1, 2**31)
        self.reward_scale = check_choice("reward_scale", reward_scale, ("expected", "first_episode"))
        self.unit_table = check_choice("unit_table", unit_table, tuple(UNIT_TABLES))
        self.enemy_wipe = check_flag("enemy_wipe", enemy_wipe)
        version = SIMULATOR_VERSIONS[self.race]
        self.title = f"Simulator smacv2_sim version {version}: SMACv2's rules, but NOT StarCraft II, nor its results."
        self.about = {"backend": self.backend, "simulator_version": str(version)}
        E, N, M = self.num_envs, self.num_agents, self.num_enemies
        is_terran, shields = self.race == "terran", int(self.race == "protoss")
        self.num_actions = FIRST_TARGET + (max(N, M) if is_terran else M)
        self.obs_size = 4 + (M + N - 1) * (8 + shields) + 6 + shields
        self.state_size = N * (7 + shields) + M * (6 + shields) + N * self.num_actions

        types, weights, exception = RACES[self.race]
        self._rules = Rules(
            table=compile_unit_table(UNIT_TABLES[self.unit_table]),
            team_types=np.array([UNIT_NAMES.index(name) for name in types]),
            team_weights=np.cumsum(weights),
            exception=UNIT_NAMES.index(exception) if exception else -1,
            num_agents=N,
            num_enemies=M,
            has_shields=bool(shields),
            is_terran=is_terran,
            first_episode_scale=self.reward_scale == "first_episode",
            enemy_wipe=self.enemy_wipe,
        )
        self._world = World(
            units=np.zeros((E, N + M), UNIT),
            battles=np.zeros(E, BATTLE),
            last_actions=np.zeros((E, N), np.int64),
            seen=np.zeros((E, M, N), np.uint8),
            owner=np.zeros((E, M), np.int64),
            first_row=np.zeros((E, N), np.int64),
        )
        self._final = self._new_views()
        self.max_reward[:] = expected_max_reward(self.race, N, M, self.unit_table)
        self._start(check_integer("seed", seed, 0, 2**63 - 1))
        self._untouched = True

    @property
    def max_reward(self):
        return self._world.battles["max_reward"]  # a view of what the kernels read, in a copied simulator, too

    def _start(self, seed):
        if seed is not None:
            seed_battles(self._world.battles, np.uint64(seed))
        spawn_all(self._world, self._rules, seed is not None)

    def _new_views(self):
        E, N = self.num_envs, self.num_agents
        return Views(
            obs=np.empty((E, N, self.obs_size), np.float32),
            state=np.empty((E, self.state_size), np.float32),
            mask=np.empty((E, N, self.num_actions), np.bool_),
        )

    def reset(self, seed=None):
        """Start a new battle everywhere.

        Args: seed, which restarts all random states (and "first_episode" scales); None goes on with the present ones,
        except that the first call finds the battles begun by the constructor.

        Returns: observation (E, N, O) float32, and info with "state" (E, S) float32, "action_mask" (E, N, A) bool,
        "battle_won" (E,) bool, "dead_allies" and "dead_enemies" (E,) int64, the last three all zero.
        """
        if seed is not None:
            seed = check_integer("seed", seed, 0, 2**63 - 1)
        if seed is not None or not self._untouched:
            self._start(seed)
        self._untouched = False
        views = self._new_views()
        view_all(self._world, self._rules, views)
        zeros = np.zeros(self.num_envs, np.int64)
        counts = {"battle_won": zeros > 0, "dead_allies": zeros, "dead_enemies": zeros.copy()}
        return views.obs, {"state": views.state, "action_mask": views.mask, **counts}

    def step(self, actions):
        """Play half a second (8 loops) of every battle.

        Args: actions (E, N) integers below A: 0 no-op (the dead only), 1 stop, 2-5 move north, south, east, west,
        6 + j attack enemy j or, for a medivac, heal ally j.

        Returns: observation (E, N, O) float32, reward (E,) float32, terminated (E,) bool, truncated (E,) bool (all
        False), and info as reset's, with "battle_won", "dead_allies", "dead_enemies" of the step just taken. If a
        battle ended there are also "final_obs" (E, N, O), "final_info" (a dict with the five keys above), and
        "_final_obs", "_final_info" (E,) bool, which say whose rows are valid (the others are zero). All arrays are the
        caller's to keep.

        Errors: ValueError for a wrong shape or type, or an unavailable action; nothing has happened then.
        """
        actions = np.ascontiguousarray(check_actions(actions, (self.num_envs, self.num_agents)), np.int64)
        E = self.num_envs
        views = self._new_views()
        outcome = Outcome(
            reward=np.empty(E, np.float32),
            terminated=np.empty(E, np.bool_),
            battle_won=np.empty(E, np.bool_),
            dead_allies=np.empty(E, np.int64),
            dead_enemies=np.empty(E, np.int64),
        )
        self._untouched = False
        wrong = first_unavailable(self._world, self._rules, actions, self.num_actions)
        if wrong >= 0:
            e, agent = divmod(wrong, self.num_agents)
            allowed = np.flatnonzero(self.observe(e)[2][agent]).tolist()
            raise ValueError(
                f"environment {e}, agent {agent}: action {actions[e, agent]} is not available, allowed are {allowed}"
            )
        _share_battles(E, self._world.units.size, self._world, self._rules, actions, views, self._final, outcome)
        info = {
            "state": views.state,
            "action_mask": views.mask,
            "battle_won": outcome.battle_won,
            "dead_allies": outcome.dead_allies,
            "dead_enemies": outcome.dead_enemies,
        }
        ended = outcome.terminated
        if ended.any():
            info["final_obs"] = _rows(self._final.obs, ended)
            info["_final_obs"] = ended.copy()
            info["final_info"] = {
                "state": _rows(self._final.state, ended),
                "action_mask": _rows(self._final.mask, ended),
                "battle_won": _rows(outcome.battle_won, ended),
                "dead_allies": _rows(outcome.dead_allies, ended),
                "dead_enemies": _rows(outcome.dead_enemies, ended),
            }
            info["_final_info"] = ended.copy()
        return views.obs, outcome.reward, ended, np.zeros(E, np.bool_), info

    def observe(self, env_index=None):
        """Look at the present battles without changing anything.

        Args: env_index, a battle, or None for all. Returns: observation (N, O), state (S,), mask (N, A), with a leading
        E for None. Errors: IndexError for a battle that does not exist.
        """
        views = self._new_views()
        view_all(self._world, self._rules, views)
        return tuple(views) if env_index is None else tuple(view[env_index].copy() for view in views)

    def render(self, env_index=0, **options):
        """Draw a battle as it stands. Args: options agent, size and others of envs.smacv2_render.draw.

        Returns: (height, width, 3) uint8. Errors: IndexError for a battle that does not exist.
        """
        from .smacv2_render import draw

        return draw(self, self._world.units[env_index], int(self._world.battles["step"][env_index]), **options)

    def load_battle(self, env_index, allies, enemies, last_actions=None):
        """Replace one battle by given units, kept in the given order, all without orders; the enemy script looks first.

        Args:
            env_index: which battle, 0..E-1.
            allies, enemies: N and M tuples (type name, x, y, health, shield, weapon cooldown in loops, energy);
                health 0 is a dead unit.
            last_actions: (N,) actions shown in the state, or None for those of a battle's start.

        Errors: ValueError for wrong counts, an unknown or other race's type, a position outside the map, or a number
        that the type cannot have; IndexError for a battle that does not exist.
        """
        if not 0 <= env_index < self.num_envs:
            raise IndexError(f"env_index is {env_index}, expected 0 to {self.num_envs - 1}")
        if len(allies) != self.num_agents or len(enemies) != self.num_enemies:
            raise ValueError(
                f"{len(allies)} allies and {len(enemies)} enemies given, "
                f"{self.map_name} has {self.num_agents} and {self.num_enemies}"
            )
        types = np.empty(self.num_agents + self.num_enemies, np.int64)
        numbers = np.empty((len(types), 6))
        for k, (name, *values) in enumerate((*allies, *enemies)):
            types[k] = UNIT_NAMES.index(check_choice("unit type", name, RACES[self.race].types))
            numbers[k] = values
            body = self._rules.table[types[k]]
            top = [MAP_SIZE, MAP_SIZE, body["health"], body["shield"], np.inf, MAX_ENERGY]
            if not all(0 <= value <= limit for value, limit in zip(numbers[k], top, strict=True)):
                raise ValueError(f"unit {name} {tuple(values)} is out of range, largest values are {tuple(top)}")
        if last_actions is not None:
            last_actions = np.asarray(last_actions, np.int64)
            if last_actions.shape != (self.num_agents,) or not np.isin(last_actions, range(self.num_actions)).all():
                raise ValueError(f"last_actions are {last_actions}, expected {self.num_agents} from 0 to A-1")
        load_units(env_index, self._world, types, numbers)
        if last_actions is not None:
            self._world.last_actions[env_index] = last_actions
        if self.enemy_wipe:
            update_wipe(env_index, self._world, self._rules)
        self._untouched = False

    def _identity(self):
        races, tables = sorted(RACES), sorted(UNIT_TABLES)
        names = (races.index(self.race), tables.index(self.unit_table))
        sizes = (self.num_envs, self.num_agents, self.num_enemies)
        flags = (self.reward_scale == "first_episode", self.enemy_wipe)
        return np.array([SIMULATOR_VERSIONS[self.race], *names, *sizes, *flags], np.int64)

    def close(self):
        """Nothing to do, since no process and no file is held; for programs that close their environments."""

    def get_state(self):
        """The whole state, all random states included, as a dict of new arrays of int64, float64 and uint8.

        Plain enough for torch.save of the tensors and torch.load with weights_only=True.
        """
        saved = {"identity": self._identity(), "untouched": np.array([self._untouched], np.int64)}
        saved |= {f"units.{name}": self._world.units[name].copy() for name in UNIT.names}
        saved |= {f"battles.{name}": self._world.battles[name].copy() for name in BATTLE.names}
        saved["battles.random"] = saved["battles.random"].view(np.int64)  # torch has no full uint64
        return saved | {name: getattr(self._world, name).copy() for name in World._fields[2:]}

    def set_state(self, saved):
        """Continue from get_state's dict (arrays or CPU tensors), bit for bit.

        Errors: ValueError if it comes from another version, map, number of battles or set of options, or is incomplete.
        """
        saved = {name: np.asarray(value) for name, value in saved.items()}
        expected = self.get_state()
        if saved.keys() != expected.keys() or any(saved[name].shape != expected[name].shape for name in expected):
            raise ValueError(f"the saved state does not fit {self.map_name} with {self.num_envs} battles")
        if (saved["identity"] != expected["identity"]).any():
            raise ValueError(
                f"the saved state comes from another simulator: version, race, unit table, battles, agents, enemies, "
                f"first-episode scale, wipe are {saved['identity'].tolist()}, here {expected['identity'].tolist()}"
            )
        self._untouched = bool(saved["untouched"][0])
        for name in UNIT.names:
            self._world.units[name] = saved[f"units.{name}"]
        for name in BATTLE.names:
            value = saved[f"battles.{name}"]
            self._world.battles[name] = value.view(np.uint64) if name == "random" else value
        for name in World._fields[2:]:
            getattr(self._world, name)[:] = saved[name]


@functools.cache
def _thread_pool(process, workers):
    """Sleeping threads, new ones for a forked process."""
    return ThreadPoolExecutor(workers)


def _share_battles(num_envs, num_units, *arguments):
    """step_battles on NUM_THREADS threads, each with its own part of the battles.

    Not numba's own parallel loop: its threads wait by spinning, which on a busy machine made a step ten times slower.
    Waking a thread takes as long as some hundred units' step, so that few battles stay on this one.
    """
    threads = min(NUM_THREADS, num_envs) if num_units >= UNITS_WORTH_THREADS else 1
    ends = [num_envs * k // threads for k in range(threads + 1)]
    rest = []
    if threads > 1:
        pool = _thread_pool(os.getpid(), threads - 1)
        rest = [pool.submit(step_battles, ends[k], ends[k + 1], *arguments) for k in range(1, threads)]
    step_battles(0, ends[1], *arguments)
    for part in rest:
        part.result()


def _rows(values, chosen):
    """A copy of values (E, ...) with zeros where `chosen` (E,) is False."""
    rows = np.zeros_like(values)
    rows[chosen] = values[chosen]
    return rows


class _Announcement(event.Listener):
    """Says once on stderr that a first call will take long: numba tells of what it compiles, not of what it kept."""

    announced = False

    def on_start(self, compilation):
        if compilation.data["dispatcher"].py_func.__module__ == __name__ and not self.announced:
            how_often = "once" if CACHE else "for this run only, unless NUMBA_CACHE_DIR names a folder to keep them in"
            text = f"smacv2_sim: compiling battle kernels not needed before, up to 15 seconds, {how_often}"
            print(text, file=sys.stderr, flush=True)
            self.announced = True

    def on_end(self, compilation):
        pass


event.register("numba:compile", _Announcement())


# ---------------------------------------------------------------------------------------------------------------------
# Two scripted allies, for orientation
# ---------------------------------------------------------------------------------------------------------------------


def random_actions(mask, rng):
    """Uniformly random available actions. Args: mask (..., A) bool, rng a NumPy generator. Returns: (...) int64."""
    return np.where(mask, rng.random(mask.shape, np.float32), -1.0).argmax(-1)


def nearest_attack_actions(env, mask):
    """Each agent attacks (heals) its nearest available target, else walks towards the nearest living enemy.

    It looks at the simulator, not at the observation. Args: env, mask (E, N, A). Returns: (E, N) int64.
    """
    units, N = env._world.units, env.num_agents
    medivac = (units["type"][:, :N] == MEDIVAC)[:, :, None]
    dx = units["x"][:, None, :] - units["x"][:, :N, None]  # (E, N, U)
    dy = units["y"][:, None, :] - units["y"][:, :N, None]
    away = np.hypot(dx, dy)
    slots = mask.shape[2] - FIRST_TARGET
    target_away = np.full((*mask.shape[:2], slots), np.inf)
    target_away[:, :, : env.num_enemies] = away[:, :, N:]
    healing = np.full_like(target_away, np.inf)
    healing[:, :, : min(N, slots)] = away[:, :, : min(N, slots)]
    target_away = np.where(mask[:, :, FIRST_TARGET:], np.where(medivac, healing, target_away), np.inf)
    goal = np.where(units["alive"][:, None, N:], away[:, :, N:], np.inf).argmin(-1)[:, :, None] + N  # (E, N, 1)
    gx, gy = np.take_along_axis(dx, goal, 2)[:, :, 0], np.take_along_axis(dy, goal, 2)[:, :, 0]
    move = np.where(np.abs(gx) > np.abs(gy), np.where(gx > 0, EAST, WEST), np.where(gy > 0, NORTH, SOUTH))
    move = np.where(np.take_along_axis(mask, move[:, :, None], 2)[:, :, 0], move, STOP)
    actions = np.where(np.isfinite(target_away).any(-1), FIRST_TARGET + target_away.argmin(-1), move)
    return np.where(mask[:, :, NO_OP], NO_OP, actions)


def play_battles(map_name, battles, choose, **options):
    """Play whole battles with actions `choose(env, mask)`.

    Returns: dict of the means of win (a fraction), return (scaled reward), length (env steps), over the first battles
    to end in each of up to 256 slots, in equal numbers, so that short battles are not over-represented.
    """
    num_envs = min(battles, 256)
    rounds = -(-battles // num_envs)
    env = SMACv2Sim(map_name, num_envs, **options)
    _, info = env.reset()
    total, length, finished = np.zeros(num_envs), np.zeros(num_envs), np.zeros(num_envs, np.int64)
    wins, returns, lengths = [], [], []
    while (finished < rounds).any():
        _, reward, terminated, _, info = env.step(choose(env, info["action_mask"]))
        total += reward
        length += 1
        counted = terminated & (finished < rounds)
        wins.extend(info["battle_won"][counted])
        returns.extend(total[counted])
        lengths.extend(length[counted])
        finished += terminated
        total[terminated] = length[terminated] = 0
    return {"win": np.mean(wins), "return": np.mean(returns), "length": np.mean(lengths)}


def main():
    import argparse

    rng = np.random.default_rng(0)
    scripts = {"random": lambda env, mask: random_actions(mask, rng), "nearest": nearest_attack_actions}
    parser = argparse.ArgumentParser(
        prog="python -m envs.smacv2_sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("maps", nargs="*", default=[f"{race}_5_vs_5" for race in RACES], help="default: %(default)s")
    parser.add_argument("--watch", metavar="FILE.gif", help="film a battle of each player instead")
    args = parser.parse_args()
    maps = args.maps
    try:
        for map_name in maps:
            SMACv2Sim(map_name, 1)
        if args.watch:
            from .smacv2_render import watch

            print("written:", *watch(args.watch, maps, scripts))
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for map_name in maps:
        for script, choose in scripts.items():
            start = time.time()
            means = play_battles(map_name, 2000, choose)
            figures = "  ".join(f"{name} {value:6.3f}" for name, value in means.items())
            print(f"{map_name:18} {script:8} {figures}  ({time.time() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    from envs import smacv2_sim  # under its own name, under which everybody finds the compiled kernels again

    sys.exit(smacv2_sim.main())
