"""The games, behind one interface: Gymnasium's vector environments with autoreset within the step (SAME_STEP).

    from envs.smacv2_sim import SMACv2Sim       # SMACv2's rules without StarCraft II
    from envs.starcraft2 import StarCraft2      # StarCraft II itself, through the smacv2 package
    from envs.spread import Spread, SpreadMPE2  # MPE's Spread: batched in numpy, and mpe2's own
    from envs.pettingzoo_batch import PettingZooBatch  # any cooperative PettingZoo environment

Shapes: E environments side by side, N agents, A actions, O observation, S state features.

    env = SMACv2Sim(map_name, num_envs, seed=0, **options), StarCraft2(...) alike
    env = Spread(level, num_envs, seed=0), SpreadMPE2(...) alike
        What is impossible, an unknown option too, is a ValueError with one sentence.

    num_envs, num_agents, num_actions, obs_size, state_size: int
        E, N, A, O, S.
    episode_limit: int
        The most steps of an episode.
    name, backend, title: str
        "terran_5_vs_5" or "spread_hard"; "sim", "starcraft2", "batched" or "mpe2"; one line that says which game it is.
    about: dict, fit for JSON
        What identifies the game in a run's files: the backend, and the versions of whatever decides about episodes.
    restarts: int
        How many crashed games have been replaced so far.

    reset(seed=None) -> obs, info
        A new episode everywhere; a seed makes it the first of that seed's, without one it is the next in line.
    step(actions) -> obs, reward, terminated, truncated, info
        actions (E, N) integers that the action mask allows.
        obs (E, N, O) float32, reward (E,) float32 of the team, terminated (E,) bool: it is over; truncated (E,) bool:
        it was cut off, and its last value is to be bootstrapped.
        info["state"] (E, S) float32, info["action_mask"] (E, N, A) bool: each agent has at least one action.
        Where an episode ended, obs, state and mask are already the next one's first. If any ended, there are also
        info["final_obs"] (E, N, O) and info["final_info"], a dict with "state", "action_mask" and, in games that can be
        won, "battle_won" (E,) bool: the last ones of the episodes that ended; rows of other environments mean nothing.
        info["invalid"] (E,) bool, absent where it cannot happen: the episode was lost with its game. What was collected
        of it must be thrown away; obs, state and mask are the first of another one.
        All arrays are new ones that the caller may keep and change; final_obs and final_info may be overwritten by the
        next step.

    get_state() -> dict of numpy arrays; set_state(dict)
        For checkpoints. An environment goes on from there to the last bit; StarCraft II and PettingZoo cannot, and call
        the next step's episodes invalid.
    save_film(folder, step), of Spread and of smacv2_render.Film around a SMACv2Sim
        For --capture-video: write evaluation.gif, what was last played since a reset, into a run folder.
    close()
        Ends processes and games, if there are any; more than once does no harm.
"""
