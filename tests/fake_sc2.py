"""A stand-in for the StarCraft II executable, so that the real smacv2 package can be tested without the game.

It answers the requests that smacv2 sends (protobuf messages over a websocket), and fights its battles with the
simulator's kernels. `install(folder)` makes a folder to point SC2PATH to. It needs smacv2's packages and `websockets`.

Environment variables make it fail. FAKE_SC2_FAULT is "<kind>@<n>", in the n-th step request of a process, or
"<kinds, separated by commas>%<n>", in each step request with probability 1/n:

    crash   end without an answer              error   answer with an error message
    hang    never answer                       spawn   from then on create no units
    kill    kill the client

and "start": end at once; "start@<n>": listen only after n seconds. With FAKE_SC2_FAULT_FILE a fault happens once only:
whoever creates that file is the one to fail. FAKE_SC2_LOG names a file that gets a line with pid and port per process.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from envs.smacv2_sim import (
    MAP_SIZE,
    MOVE,
    NO_ORDER,
    RACES,
    READY,
    TARGET,
    UNIT,
    UNIT_NAMES,
    WIND_UP,
    WOL_UNITS,
    SMACv2Sim,
    can_attack,
    compile_unit_table,
    play_loop,
    unpack_points,
)

BUILD = 75689  # 4.10.0
FIRST_RL_TYPE = 1000  # smacv2 takes the last nine of the game's unit types for its own
BLIZZARD_TYPES = (9, 4, 107, 51, 48, 54, 74, 73, 105)  # of the enemies, in the order of UNIT_NAMES
ABILITY_STOP, ABILITY_MOVE, ABILITY_ATTACK, ABILITY_HEAL = 4, 16, 23, 386


def install(folder: Path) -> Path:
    """Make a folder that looks like the game's, whose executable is this file."""
    game = folder / f"Versions/Base{BUILD}/SC2_x64"
    map_file = folder / "Maps/SMAC_Maps/32x32_flat.SC2Map"
    for file in (game, map_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    map_file.write_bytes(b"the stand-in does not read this")
    root = Path(__file__).parent.parent
    game.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    game.chmod(0o755)
    return folder


class Battlefield:
    """Units of the running battle: allies first, in the order in which smacv2 numbers them, then enemies."""

    table = compile_unit_table(WOL_UNITS)

    def __init__(self, seed: int):
        self.seed = seed
        self.sim: SMACv2Sim | None = None  # keeps the units; what it does in a step is done loop by loop here
        self.units, self.num_allies = np.zeros(0, UNIT), 0
        self.ordered: list[tuple[bool, int, float, float]] = []  # (enemy, type, x, y) to be created
        self.first_tag, self.loop = 1, 0

    def create(self, unit_type: int, owner: int, x: float, y: float) -> None:
        enemy = owner == 2
        kind = BLIZZARD_TYPES.index(unit_type) if enemy else unit_type - FIRST_RL_TYPE
        self.ordered.append((enemy, kind, x, y))

    def spawn(self) -> None:
        """Create what was ordered, on the next step request as in the game."""
        self.ordered.sort(key=lambda unit: unit[0])  # stable
        types = np.array([unit[1] for unit in self.ordered])
        points = np.array([unit[2:] for unit in self.ordered])
        N = self.num_allies = sum(not unit[0] for unit in self.ordered)
        unpack_points(self.table, types, points)
        order = [*np.lexsort((points[:N, 1], points[:N, 0], types[:N])), *range(N, len(types))]
        units = []
        for i in order:
            name, body = UNIT_NAMES[types[i]], self.table[types[i]]
            energy = 50.0 if name == "medivac" else 0.0
            units.append((name, *points[i], body["health"], body["shield"], 0.0, energy))
        if self.sim is None:
            race = next(race for race, (names, *_) in RACES.items() if units[0][0] in names)
            self.sim = SMACv2Sim(f"{race}_{N}_vs_{len(units) - N}", 1, self.seed)
        self.sim.load_battle(0, units[:N], units[N:])
        self.first_tag += len(self.units)
        self.units, self.battle = self.sim._world.units[0], self.sim._world.battles[0]
        self.ordered = []

    def step(self, loops: int) -> None:
        if self.ordered:
            self.spawn()
        for _ in range(loops):
            play_loop(self.units, self.table, self.battle, self.num_allies)
        self.loop += loops

    def alive(self):
        """Yield (tag, owner, unit) of the living."""
        for i, unit in enumerate(self.units):
            if unit["alive"]:
                yield self.first_tag + i, 1 if i < self.num_allies else 2, unit

    def kill(self, tags) -> None:
        for tag in tags:
            if 0 <= tag - self.first_tag < len(self.units):
                self.units[tag - self.first_tag]["alive"] = 0

    def command(self, order) -> None:
        """Carry out a unit command of the protocol for an ally."""
        for tag in order.unit_tags:
            unit = self.units[tag - self.first_tag]
            target = order.target_unit_tag - self.first_tag
            stopped = True
            if order.ability_id in (ABILITY_ATTACK, ABILITY_HEAL):
                heal = order.ability_id == ABILITY_HEAL
                if not heal and not can_attack(self.table, unit, self.units[target]):
                    continue  # refused: the unit goes on as before
                stopped = unit["attack_target"] != target
                unit["order"], unit["target"] = TARGET, target
            elif order.ability_id == ABILITY_MOVE:
                radius = self.table[unit["type"]]["radius"]
                unit["order"] = MOVE
                point = order.target_world_space_pos
                unit["order_x"], unit["order_y"] = np.clip((point.x, point.y), radius, MAP_SIZE - radius)
            elif order.ability_id == ABILITY_STOP:
                unit["order"] = NO_ORDER
            if stopped and unit["attack"] == WIND_UP:
                unit["attack"], unit["cooldown"] = READY, 0.0


class Game:
    """Answers requests of the protocol; one client."""

    def __init__(self):
        from s2clientprotocol import sc2api_pb2

        self.api = sc2api_pb2
        self.status = sc2api_pb2.launched
        self.field: Battlefield | None = None
        self.steps, self.spawns = 0, True
        kinds, _, number = os.environ.get("FAKE_SC2_FAULT", "").partition("@")
        kinds, _, odds = kinds.partition("%")
        self.faults, self.at, self.odds = kinds.split(","), int(number or 0), int(odds or 0)

    def fault(self) -> str:
        """The kind of fault of this step request, mostly none."""
        due = random.random() * self.odds < 1 if self.odds else self.steps == self.at
        if not due:
            return ""
        once = os.environ.get("FAKE_SC2_FAULT_FILE")
        try:
            if once:
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return ""
        return random.choice(self.faults)

    def answer(self, data: bytes) -> bytes | None:
        """The serialised response, or None to end."""
        request = self.api.Request.FromString(data)
        kind = request.WhichOneof("request")
        response = self.api.Response(id=request.id)
        if kind == "quit":
            return None
        getattr(response, kind).SetInParent()
        getattr(self, kind)(getattr(request, kind), getattr(response, kind), response)
        response.status = self.status
        return response.SerializeToString()

    def ping(self, request, reply, response) -> None:
        reply.game_version, reply.base_build, reply.data_build = "4.10.0.75689", BUILD, BUILD

    def create_game(self, request, reply, response) -> None:
        self.field = Battlefield(request.random_seed)
        self.status = self.api.init_game

    def join_game(self, request, reply, response) -> None:
        reply.player_id = 1
        self.status = self.api.in_game

    def game_info(self, request, reply, response) -> None:
        raw = reply.start_raw
        for size in (raw.map_size, raw.pathing_grid.size, raw.terrain_height.size, raw.playable_area.p1):
            size.x = size.y = 32
        raw.playable_area.p0.x = raw.playable_area.p0.y = 0
        raw.pathing_grid.bits_per_pixel, raw.pathing_grid.data = 1, b"\xff" * (32 * 32 // 8)
        raw.terrain_height.bits_per_pixel, raw.terrain_height.data = 8, b"\x80" * (32 * 32)

    def data(self, request, reply, response) -> None:
        for unit_id in range(FIRST_RL_TYPE + len(UNIT_NAMES)):
            reply.units.add(unit_id=unit_id, name=f"unit {unit_id}")

    def debug(self, request, reply, response) -> None:
        for command in request.debug:
            if command.WhichOneof("command") == "kill_unit":
                self.field.kill(command.kill_unit.tag)
            elif self.spawns:
                unit = command.create_unit
                self.field.create(unit.unit_type, unit.owner, unit.pos.x, unit.pos.y)

    def action(self, request, reply, response) -> None:
        for action in request.actions:
            self.field.command(action.action_raw.unit_command)
            reply.result.append(1)

    def step(self, request, reply, response) -> None:
        self.steps += 1
        match self.fault():
            case "crash":
                os._exit(1)
            case "hang":
                time.sleep(10**6)
            case "kill":
                os.kill(os.getppid(), signal.SIGKILL)
            case "spawn":
                self.spawns = False
            case "error":
                response.error.append("an error on demand")
                return
        self.field.step(request.count)

    def observation(self, request, reply, response) -> None:
        reply.observation.game_loop = self.field.loop
        for tag, owner, unit in self.field.alive():
            body = self.field.table[unit["type"]]
            shown = reply.observation.raw_data.units.add(
                tag=tag,
                owner=owner,
                alliance=1 if owner == 1 else 4,
                display_type=1,
                unit_type=FIRST_RL_TYPE + unit["type"] if owner == 1 else BLIZZARD_TYPES[unit["type"]],
                health=unit["health"],
                health_max=body["health"],
                shield=unit["shield"],
                shield_max=body["shield"],
                energy=unit["energy"],
                weapon_cooldown=max(unit["cooldown"], 0.0),
            )
            shown.pos.x, shown.pos.y = unit["x"], unit["y"]

    def save_replay(self, request, reply, response) -> None:
        reply.data = b"a replay"


def serve(port: int, quit=lambda: None):
    """A server for one client at a time; call its serve_forever(). Its client's wish to end is passed to `quit`."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import serve

    game = Game()

    def handle(socket) -> None:
        try:
            # The client sends its bytes as text frames, which must not be decoded.
            while (reply := game.answer(socket.recv(decode=False))) is not None:
                socket.send(reply)
        except ConnectionClosed:
            return  # and wait for another client: the real game does not end either
        quit()

    server = serve(handle, "127.0.0.1", port, compression=None, max_size=None, ping_interval=None)
    server.game = game
    return server


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("-port") + 1])
    if log := os.environ.get("FAKE_SC2_LOG"):
        with open(log, "a") as lines:
            lines.write(f"{os.getpid()} {port}\n")
    fault, _, seconds = os.environ.get("FAKE_SC2_FAULT", "").partition("@")
    if fault == "start":
        if not seconds:
            sys.exit(1)
        time.sleep(float(seconds))
    serve(port, quit=lambda: os._exit(0)).serve_forever()
