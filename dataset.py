"""Storyboards, the pocket world, and the path every video takes to the disk.

HEADER
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

FPS = 16                    # frames a second, as CogVideoX was trained (3.1)
SEGMENT = 48                # frames in a 3-second segment
SECONDS = SEGMENT // FPS


# 1. Small shared things -----------------------------------------------------------------------------------


class UserError(ValueError):
    """The user's mistake, in one sentence: what is wrong, where, what to do. Exit status 2."""


def nearest(word, known):
    """', did you mean ...?' for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence (exit status 2) that name the nearest known flag or value."""

    def __init__(self, *args, **kwargs):
        def wide(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110)
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": wide, **kwargs})

    def parse_args(self, args=None, namespace=None):
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            word = extra[0].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            what = "unknown flag" if word.startswith("-") else "unexpected argument"
            self.error(f"{what} {word}{nearest(word, flags)}")
        return known

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"unknown value {value}{nearest(str(value), choices)} (known: {', '.join(choices)})")

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run_main(main):
    """Calls `main()` and exits: 0 done, 2 the user's mistake, 130 interrupted, 1 (and a traceback) anything else."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def atomic(path):
    """Yields a temporary path beside `path`, with its suffix, and renames it onto `path` if all goes well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def in_parallel(work, items, what, unit):
    """Calls `work(item)` for every item on two threads, with a progress bar; the first exception cancels the rest."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, item) for item in items]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=what, unit=unit):
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# 2. Storyboards (3.2) ---------------------------------------------------------------------------------------

START, END = "<start_scene>", "<end_scene>"


@dataclass(frozen=True)
class Segment:
    """What happens in three seconds: the text with its scene marks, what to avoid, and which scene it is in."""
    text: str
    negative: str | None
    scene: int


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON, {error.msg} at line {error.lineno}, column {error.colno}") from None


def check_marks(text, where):
    """Anything that looks like a scene mark and is not one: `<start_sceen>`, `Send_scene`, `<END_SCENE>`."""
    rest = text.replace(START, " ").replace(END, " ")
    for word in re.findall(r"<[^<>\n]{1,24}>|[<\[({/]*\w*_\w*[>\])}]*|<\w+|\w+>", rest):
        match = difflib.get_close_matches(word.lower(), [START, END], n=1, cutoff=0.7)
        if match:
            raise UserError(f"{where}: {word} is not a scene mark, did you mean {match[0]}?")


def parse_format_3(text, name):
    """One video: the pieces between marks and blank lines are its paragraphs, and every one is inside a scene."""
    check = re.split(r"\n\s*\n", text.strip())
    for number, block in enumerate(check, 1):
        check_marks(block, f"{name}, paragraph {number}")
    if START not in text and END not in text:
        raise UserError(f"{name}: no scene marks; write {START} before a scene's first paragraph and {END} after its last")
    scenes, opened = [], None                                       # a scene is a list of paragraphs
    for piece in re.split(rf"({START}|{END}|\n\s*\n)", text):
        piece, number = " ".join(piece.split()), sum(map(len, scenes)) + 1
        where = f"{name}, paragraph {number}"
        if piece == START:
            if opened:
                raise UserError(f"{where}: {START} inside the scene of paragraph {opened}, which no {END} has ended")
            scenes.append([])
            opened = number
        elif piece == END:
            if not opened:
                raise UserError(f"{name}, paragraph {max(number - 1, 1)}: {END} without a {START} before it")
            if not scenes[-1]:
                raise UserError(f"{where}: a scene without text")
            opened = None
        elif piece:
            if not opened:
                raise UserError(f"{where}: a paragraph outside any scene, begin it with {START}")
            scenes[-1].append(piece)
    if opened:
        raise UserError(f"{name}, paragraph {opened}: the scene that begins here is never closed, end its last paragraph with {END}")
    return [Segment(text, None, number) for number, scene in enumerate(scenes) for text in mark_scene(scene)]


def mark_scene(paragraphs):
    """The paragraphs of one scene as the text encoder reads them: marks around the first and the last."""
    last = len(paragraphs) - 1
    return [START * (i == 0) + text + END * (i == last) for i, text in enumerate(paragraphs)]


def parse_official(video, name):
    """One video of the official format: a list of {text, requires_scene_transition, neg_text}."""
    if not isinstance(video, list) or not video:
        raise UserError(f"{name}: a video must be a list of segments that is not empty")
    scenes = []
    for number, segment in enumerate(video, 1):
        where = f"{name}, segment {number}"
        text, negative, cut = check_segment(segment, where)
        if number == 1 or cut or text.startswith(START) or after_end:
            scenes.append([])
        after_end = text.endswith(END)
        text = " ".join(text.removeprefix(START).removesuffix(END).split())
        if START in text or END in text:
            raise UserError(f"{where}: a scene mark in the middle of the text")
        if not text:
            raise UserError(f"{where}: the prompt is empty")
        scenes[-1].append((text, negative))
    # DIFF: the official sampler leaves the video's first start mark and last end mark out; Format 3 has them, so we do.
    return [Segment(text, negative, number) for number, scene in enumerate(scenes)
            for text, (_, negative) in zip(mark_scene([text for text, _ in scene]), scene)]


def check_segment(segment, where):
    """(text, negative, requires_scene_transition) of a segment object, types checked."""
    fields = {"text": (str,), "requires_scene_transition": (bool,), "neg_text": (str, type(None))}
    if not isinstance(segment, dict):
        raise UserError(f"{where}: a segment must be an object with the field text")
    for field, value in segment.items():
        if field not in fields:
            raise UserError(f"{where}: unknown field {field}{nearest(field, fields)}")
        if not isinstance(value, fields[field]):
            raise UserError(f"{where}: {field} must be {'true or false' if bool in fields[field] else 'text'}")
    if "text" not in segment:
        raise UserError(f"{where}: the field text is missing")
    check_marks(segment["text"], where)
    negative = (segment.get("neg_text") or "").strip() or None
    return segment["text"].strip(), negative, segment.get("requires_scene_transition", False)


def parse_storyboard(path):
    """Reads a storyboard: a list of videos, each a list of `Segment` (one for every three seconds).

    `.txt` is Format 3 (one video), `.json` the official list of videos, `.jsonl` one video a line.
    Raises UserError, naming the file and the paragraph, line or segment.
    """
    name, text = Path(path).name, read_text(path)
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{name}: a storyboard is .txt (Format 3), .json or .jsonl")
    if not text.strip():
        raise UserError(f"{name}: the storyboard is empty")
    if suffix == ".txt":
        return [parse_format_3(text, name)]
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [parse_official(read_json(line, f"{name}, line {number}"), f"{name}, line {number}") for number, line in lines]
    videos = read_json(text, name)
    if not isinstance(videos, list) or not videos or isinstance(videos[0], dict):
        raise UserError(f"{name}: must be a list of videos, each a list of segments: [[{{...}}, {{...}}]]")
    return [parse_official(video, f"{name}, video {number}") for number, video in enumerate(videos, 1)]


# 3. The pocket world ----------------------------------------------------------------------------------------
# Text tells the room, who is there and what they do. Everything named in a palette below is drawn once an
# episode and never told, so a room or a character that comes back looks the same only to a model that remembers.

ROOMS = {"kitchen": "with its window and counter", "bedroom": "with its bed and the moon outside",
         "library": "with its tall bookshelf", "garden": "with its tree and white fence"}
CHARACTERS = {"Mia": "cat", "Pip": "mouse"}
CHARACTER_COLOURS = {"red": (220, 50, 50), "yellow": (250, 205, 40), "green": (50, 165, 70),
                     "cyan": (50, 195, 210), "blue": (55, 85, 220), "magenta": (205, 65, 195)}
WALL_COLOURS = {"rose": (244, 172, 172), "sand": (247, 224, 150), "mint": (172, 226, 178),
                "sky": (164, 208, 246), "lilac": (204, 180, 240), "pearl": (234, 234, 230)}
FLOOR_COLOURS = {"brown": (150, 102, 72), "slate": (98, 108, 128), "olive": (122, 132, 82),
                 "terracotta": (190, 108, 84), "tan": (204, 168, 122), "plum": (116, 80, 106)}
FURNITURE_COLOURS = {"navy": (44, 58, 120), "crimson": (150, 34, 50), "forest": (30, 96, 62),
                     "ochre": (206, 146, 40), "white": (242, 238, 228), "violet": (112, 60, 142)}
FURNITURE = ("armchair", "table", "chest", "lamp")
PLACES = {"left": 0.375, "middle": 0.75, "right": 1.125}            # lengths are in picture heights: 1 x 1.5
OUTSIDE = {"left": -0.375, "right": 1.875}                          # walking a place or two takes 1 or 2 pixels a frame
CORNERS = {"left": 0.27, "middle": 0.75, "right": 1.23}             # where furniture stands
FLOOR = 0.70                                                        # where wall and floor meet
FEET = {"Mia": 0.88, "Pip": 0.95}
POSES = ("stand", "air", *(f"walk{i}" for i in range(4)), *(f"wave{i}" for i in range(4)))
TEST_SEEDS = 1_000_000                                              # seeds from here on are never trained on


@dataclass(frozen=True)
class Room:
    """What an episode hides about a room: names into the palettes, the furniture's kind and place."""
    wall: str
    floor: str
    furniture: str
    place: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A room, who is in it, when (segments first ... first + segments - 1), and where everybody is in every frame.

    A scene is shot with one frame beyond its last segment, so that no latent of four frames sees two scenes.
    """
    room: str
    cast: tuple
    first: int
    segments: int
    feet: np.ndarray             # [48 segments + 1, 2, 2]: x, y of Mia's and Pip's feet in picture heights, NaN when away
    poses: np.ndarray            # int [48 segments + 1, 2]: 2 * index in POSES + (1 when facing right)


@dataclass(frozen=True)
class Episode:
    """A storyboard and the ground truth behind it, S segments long."""
    seed: int
    scenes: tuple[Scene, ...]
    segments: tuple[Segment, ...]
    colours: dict                # character -> name in CHARACTER_COLOURS
    rooms: dict                  # room -> Room

    @property
    def feet(self):
        """Where everybody is in every frame of the joined video, [48 S + 1, 2, 2]."""
        return join_scenes([scene.feet for scene in self.scenes])


def join_scenes(clips):
    """Clips of 48 n + 1 frames -> one of 48 S + 1: frame 48 i is the last of segment i - 1, so a cut shows at 48 i + 1."""
    return np.concatenate([clip[k > 0:] for k, clip in enumerate(clips)])


def pick(rng, options):
    options = list(options)
    return options[rng.integers(len(options))]


def plan_rooms(rng, segments):
    """[(room, segments)] of scenes of 1 to 3 segments. Rooms recur: mostly A B A, sometimes from farther back.

    From three segments on, every episode comes back to its first room after another.
    """
    scenes, first = [], 0
    while first < segments:
        rooms = [room for room, _ in scenes]
        returns = len(rooms) == 2 or len(rooms) > 2 and rng.random() < 0.7
        room = rooms[-2] if returns else pick(rng, [room for room in ROOMS if room not in rooms[-2:]])
        needed = max(2 - len(rooms), 0) if segments >= 3 else 0             # segments kept for the return
        length = min(rng.choice([1, 2, 3], p=[0.76, 0.16, 0.08]), segments - first - needed)
        scenes.append((room, int(length)))
        first += length
    return scenes


VERBS = {"stand": ("stands still", "waits quietly", "rests"), "wave": ("waves a paw", "waves hello"),
         "jump": ("jumps up and down", "hops happily"), "walk": ("walks", "strolls", "wanders"),
         "run": ("runs", "dashes", "races")}
AT = {"left": ("on the left", "at the left side"), "middle": ("in the middle", "in the centre"),
      "right": ("on the right", "at the right side")}
FILLERS = ("Nobody else is here.", "The camera does not move.", "Everything else is quiet.", "It is a calm day.")


@dataclass(frozen=True)
class Action:
    """What one character does in a segment: from where (or from outside) to where, in words and in picture heights."""
    verb: str
    start: str
    end: str
    enters: bool

    def clause(self, rng, who):
        name = pick(rng, (who, f"{who} the {CHARACTERS[who]}"))
        verb = pick(rng, VERBS[self.verb])
        if self.enters:
            return f"{name} {verb} in from the {self.start} and stops {pick(rng, AT[self.end])}"
        if self.start != self.end:
            return f"{name} {verb} from the {self.start} to the {self.end}"
        return f"{name} {verb} {pick(rng, AT[self.end])}"

    def at(self, t):
        """(x, lift, pose, facing right) at frame t of 0 ... 48. Poses are drawn on fours, as in cheap cartoons."""
        start = (OUTSIDE if self.enters else PLACES)[self.start]
        end = PLACES[self.end]
        right = end > start if end != start else self.end == "left"
        if self.verb in ("walk", "run"):
            frames, hold = (SEGMENT, 4) if self.verb == "walk" else (SEGMENT // 2, 2)
            x = start + (end - start) * min(t / frames, 1)
            return x, 0.0, f"walk{(t + 3) // hold % 4}" if t < frames else "stand", right
        if self.verb == "jump":
            lift = 0.14 * abs(np.sin(2 * np.pi * t / SEGMENT))
            return end, lift, "air" if lift > 0.04 else "stand", right
        return end, 0.0, f"wave{(t + 3) // 4 % 4}" if self.verb == "wave" else "stand", right


def plan_action(rng, place, enters):
    """A random action from `place`: a place in the room, or a side when the character enters."""
    verb = pick(rng, ("walk", "run") if enters else ("stand", "wave", "wave", "jump", "jump", "walk", "walk", "run"))
    if verb not in ("walk", "run"):
        return Action(verb, place, place, enters)
    end = place if enters else pick(rng, [end for end in PLACES if end != place])
    return Action(verb, place, end, enters)


def plan_segment(rng, starts, new_scene):
    """{who: Action} for characters that are at {who: place}; at the end of a segment everyone has a place alone."""
    while True:
        enters = {who: new_scene and rng.random() < 0.2 for who in starts}
        sides = {who: pick(rng, OUTSIDE) if enters[who] else place for who, place in starts.items()}
        plan = {who: plan_action(rng, sides[who], enters[who]) for who in starts}
        if len({action.end for action in plan.values()}) == len(plan):
            return plan


def paragraph(rng, room, plan):
    """The text of one segment without its marks, 15 to 34 words."""
    clauses = [action.clause(rng, who) for who, action in sorted(plan.items(), key=lambda _: rng.random())]
    deed = pick(rng, (" while ", " and ", "; meanwhile ")).join(clauses)
    where = pick(rng, (room, f"{room} {ROOMS[room]}", f"{room} {ROOMS[room]}"))
    if len(clauses) == 1 or len(deed.split()) < 14:
        where = f"{room} {ROOMS[room]}"
    text = pick(rng, (f"In the {where}, {deed}.", f"Here is the {where}: {deed}.", f"We see the {where}, and {deed}."))
    text = text if len(text.split()) <= 34 else f"In the {room}, {deed}."
    while len(text.split()) < 15:
        text += " " + pick(rng, [filler for filler in FILLERS if filler not in text])
    return text


def plan_scene(rng, room, first, segments):
    """A scene and its paragraphs: a cast, a place for everyone, and an action for everyone in every segment."""
    cast = pick(rng, (("Mia",), ("Pip",), ("Mia", "Pip"), ("Mia", "Pip")))
    places = dict(zip(cast, rng.permutation(list(PLACES)).tolist()))
    feet = np.full((SEGMENT * segments + 1, 2, 2), np.nan, np.float32)
    poses = np.zeros((SEGMENT * segments + 1, 2), int)
    texts = []
    for i in range(segments):
        plan = plan_segment(rng, places, new_scene=i == 0)
        places = {who: action.end for who, action in plan.items()}
        texts.append(paragraph(rng, room, plan))
        for who, action in plan.items():
            n = list(CHARACTERS).index(who)
            for t in range(SEGMENT + 1):
                x, lift, pose, right = action.at(t)
                feet[SEGMENT * i + t, n] = x, FEET[who] - lift
                poses[SEGMENT * i + t, n] = 2 * POSES.index(pose) + right
    return Scene(room, cast, first, segments, feet, poses), texts


def episode(seed, segments):
    """The episode of a seed: `segments` segments of 3 seconds. The same seed gives the same episode everywhere."""
    rng = np.random.default_rng([2504, seed])
    colours = dict(zip(CHARACTERS, rng.permutation(list(CHARACTER_COLOURS)).tolist()))
    rooms = {room: Room(pick(rng, WALL_COLOURS), pick(rng, FLOOR_COLOURS), pick(rng, FURNITURE),
                        pick(rng, CORNERS), pick(rng, FURNITURE_COLOURS)) for room in ROOMS}
    scenes, story, first = [], [], 0
    for room, length in plan_rooms(rng, segments):
        scene, texts = plan_scene(rng, room, first, length)
        story += [Segment(text, None, len(scenes)) for text in mark_scene(texts)]
        scenes.append(scene)
        first += length
    return Episode(seed, tuple(scenes), tuple(story), colours, rooms)


def storyboard_text(episode):
    """The episode's storyboard in Format 3: a paragraph a segment, ready to be edited."""
    return "\n\n".join(segment.text for segment in episode.segments) + "\n"


class Canvas:
    """A picture of flat shapes with smooth edges. Shapes are signed distances (negative inside) in picture heights."""

    def __init__(self, height, width, pixel, left=0.0, top=0.0):
        self.pixel = pixel
        self.x = left + (np.arange(width, dtype=np.float32) + 0.5)[None, :] * pixel
        self.y = top + (np.arange(height, dtype=np.float32) + 0.5)[:, None] * pixel
        self.rgba = np.zeros((height, width, 4), np.float32)                 # premultiplied, 0 ... 255

    def ellipse(self, x, y, rx, ry):
        return (np.hypot((self.x - x) / rx, (self.y - y) / ry) - 1) * min(rx, ry)

    def box(self, left, top, right, bottom, corner=0.0):
        dx = np.abs(self.x - (left + right) / 2) - (right - left) / 2 + corner
        dy = np.abs(self.y - (top + bottom) / 2) - (bottom - top) / 2 + corner
        return np.hypot(dx.clip(0), dy.clip(0)) + np.maximum(dx, dy).clip(max=0) - corner

    def line(self, x0, y0, x1, y1, thick):
        dx, dy = x1 - x0, y1 - y0
        along = (((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
        return np.hypot(self.x - x0 - along * dx, self.y - y0 - along * dy) - thick / 2

    def polygon(self, *points):
        """Convex, corners in clockwise order."""
        edges = zip(points, points[1:] + points[:1])
        return np.maximum.reduce([((y1 - y0) * (self.x - x0) - (x1 - x0) * (self.y - y0)) / np.hypot(x1 - x0, y1 - y0)
                                  for (x0, y0), (x1, y1) in edges])

    def paint(self, *shapes, outline=0.0):
        """Paints (distance, colour) pairs in order, first all of them a little larger in ink if there is an outline."""
        inked = [(distance - outline, INK) for distance, _ in shapes] if outline else []
        for distance, colour in [*inked, *shapes]:
            near = distance < self.pixel / 2
            cover = (0.5 - distance[near] / self.pixel).clip(max=1)[:, None]
            self.rgba[near] += cover * (np.array([*colour, 255], np.float32) - self.rgba[near])


INK, WHITE, WOOD, LEAF, PINK = (40, 34, 46), (250, 250, 250), (146, 104, 66), (96, 160, 84), (250, 170, 180)
OUTLINE = 0.011


def mix(colour, other, amount):
    return tuple(a + (b - a) * amount for a, b in zip(colour, other))


def draw_room(canvas, name):
    """What never changes about a room, so that its name in the text is enough to draw it."""
    c = canvas
    if name == "kitchen":
        c.paint((c.box(0.86, 0.10, 1.34, 0.46, 0.02), WHITE), outline=OUTLINE)
        c.paint((c.box(0.90, 0.14, 1.085, 0.42), (150, 210, 250)), (c.box(1.115, 0.14, 1.30, 0.42), (150, 210, 250)))
        c.paint((c.box(-0.1, 0.48, 0.62, 0.74), (214, 214, 220)), (c.box(-0.1, 0.44, 0.66, 0.50), (120, 110, 116)), outline=OUTLINE)
        c.paint((c.line(0.30, 0.53, 0.30, 0.72, 0.012), INK), (c.ellipse(0.25, 0.61, 0.016, 0.016), INK), (c.ellipse(0.35, 0.61, 0.016, 0.016), INK))
    if name == "bedroom":
        c.paint((c.box(0.14, 0.10, 0.56, 0.46, 0.02), WHITE), outline=OUTLINE)
        c.paint((c.box(0.18, 0.14, 0.52, 0.42), (40, 48, 96)), (c.ellipse(0.36, 0.28, 0.09, 0.09), (255, 240, 170)))
        c.paint((c.ellipse(0.41, 0.25, 0.08, 0.08), (40, 48, 96)))
        c.paint((c.box(1.36, 0.36, 1.44, 0.76, 0.02), WOOD), (c.box(0.82, 0.58, 1.40, 0.72, 0.03), WHITE), (c.box(1.20, 0.53, 1.36, 0.62, 0.04), PINK),
                (c.box(0.80, 0.52, 0.86, 0.76, 0.02), WOOD), outline=OUTLINE)
    if name == "library":
        c.paint((c.box(0.42, 0.06, 1.08, 0.72, 0.01), WOOD), outline=OUTLINE)
        for row in range(3):
            top = 0.10 + 0.20 * row
            c.paint((c.box(0.46, top, 1.04, top + 0.16), mix(WOOD, INK, 0.55)))
            for i, colour in enumerate(((196, 84, 74), (90, 140, 180), (226, 190, 110), (110, 160, 110))):
                x = 0.48 + 0.14 * ((i + row) % 4)
                c.paint((c.box(x, top + 0.03, x + 0.11, top + 0.16), colour))
    if name == "garden":
        c.paint((c.ellipse(0.20, 0.17, 0.10, 0.10), (255, 236, 130)))
        for i in range(8):
            c.paint((c.box(0.05 + 0.19 * i, 0.50, 0.15 + 0.19 * i, 0.73, 0.03), WHITE))
        c.paint((c.box(-0.1, 0.57, 1.6, 0.61), WHITE))
        c.paint((c.box(1.16, 0.40, 1.26, 0.75), WOOD), (c.ellipse(1.21, 0.25, 0.24, 0.20), LEAF), outline=OUTLINE)


def draw_furniture(canvas, kind, x, colour):
    """The big piece of furniture that an episode puts into a room, centred at x."""
    c, dark = canvas, mix(colour, INK, 0.35)
    shapes = {
        "armchair": lambda: [(c.box(x - .15, .44, x + .15, .74, .07), colour), (c.box(x - .14, .64, x + .14, .78, .02), dark),
                             (c.box(x - .21, .58, x - .12, .80, .04), colour), (c.box(x + .12, .58, x + .21, .80, .04), colour)],
        "table": lambda: [(c.box(x - .17, .60, x - .12, .82), dark), (c.box(x + .12, .60, x + .17, .82), dark),
                          (c.box(x - .23, .54, x + .23, .64, .03), colour)],
        "chest": lambda: [(c.box(x - .18, .60, x + .18, .81, .02), colour), (c.box(x - .19, .51, x + .19, .63, .05), dark),
                          (c.box(x - .03, .59, x + .03, .67, .01), (250, 214, 90))],
        "lamp": lambda: [(c.box(x - .02, .45, x + .02, .80), dark), (c.box(x - .10, .77, x + .10, .81, .02), dark),
                         (c.polygon((x - .09, .20), (x + .09, .20), (x + .17, .46), (x - .17, .46)), colour)],
    }
    canvas.paint(*shapes[kind](), outline=OUTLINE)


@lru_cache(maxsize=64)
def draw_background(name, room, height, width):
    """A room of an episode without its characters, uint8 [height, width, 3]."""
    canvas = Canvas(height, width, 1 / height)
    canvas.paint((canvas.box(-1, -1, 3, 2), WALL_COLOURS[room.wall]), (canvas.box(-1, FLOOR, 3, 2), FLOOR_COLOURS[room.floor]))
    canvas.paint((canvas.box(-1, FLOOR - 0.012, 3, FLOOR + 0.008), mix(FLOOR_COLOURS[room.floor], INK, 0.4)))
    draw_room(canvas, name)
    draw_furniture(canvas, room.furniture, CORNERS[room.place], FURNITURE_COLOURS[room.colour])
    return canvas.rgba[..., :3].round().astype(np.uint8)


def eyes(canvas, x, y, side):
    c = canvas
    for dx in (-0.04, 0.04):
        c.paint((c.ellipse(x + dx, y, 0.033, 0.040), WHITE))
        c.paint((c.ellipse(x + dx + 0.014 * side, y + 0.004, 0.016, 0.022), INK))


def limbs(canvas, pose, hips, hip_y, shoulder, shoulder_y, reach, thick, colour):
    """Two legs and two arms: swinging when walking, an arm up when waving, legs apart in the air."""
    phase = int(pose[4:] or 0) if pose[:4] in ("walk", "wave") else 0
    swing = 0.06 * np.sin(np.pi * phase / 2) if pose.startswith("walk") else 0.05 if pose == "air" else 0.0
    tips = {-1: (-shoulder - reach / 2, shoulder_y + reach), 1: (shoulder + reach / 2, shoulder_y + reach)}
    if pose.startswith("wave"):
        tips[1] = (shoulder + 0.05 + (0.0, 0.04, 0.08, 0.04)[phase], shoulder_y - 1.2 * reach)
    if pose == "air":
        tips = {side: (side * (shoulder + reach), shoulder_y - reach / 2) for side in tips}
    legs = [(canvas.line(side * hips, hip_y, side * (hips + swing), -thick / 2, thick), colour) for side in (-1, 1)]
    arms = [(canvas.line(side * shoulder, shoulder_y, *tips[side], thick), colour) for side in (-1, 1)]
    return [*legs, *arms]


def draw_cat(canvas, colour, pose, side):
    c, pale = canvas, mix(colour, WHITE, 0.65)
    ears = [c.polygon((s * 0.095 - 0.055, -0.42), (s * 0.125, -0.56), (s * 0.095 + 0.055, -0.42))
            for s in (-1, 1)]
    tail = [(c.line(-0.06 * side, -0.10, -0.17 * side, -0.16, 0.04), colour),
            (c.line(-0.17 * side, -0.16, -0.18 * side, -0.30, 0.04), colour)]
    c.paint(*tail, *limbs(c, pose, 0.05, -0.10, 0.07, -0.26, 0.09, 0.055, colour),
            *[(ear, colour) for ear in ears], (c.ellipse(0, -0.18, 0.095, 0.13), colour),
            (c.ellipse(0.015 * side, -0.37, 0.135, 0.105), colour), outline=OUTLINE)
    c.paint((c.ellipse(0, -0.16, 0.055, 0.085), pale), (c.ellipse(0.03 * side, -0.325, 0.06, 0.038), pale))
    eyes(c, 0.03 * side, -0.39, side)
    c.paint((c.ellipse(0.035 * side, -0.335, 0.016, 0.012), INK))


def draw_mouse(canvas, colour, pose, side):
    c, pale = canvas, mix(colour, WHITE, 0.65)
    ears = [c.ellipse(s * 0.125, -0.29, 0.088, 0.088) for s in (-1, 1)]
    tail = (c.line(-0.08 * side, -0.06, -0.21 * side, -0.09, 0.022), colour)
    c.paint(tail, *limbs(c, pose, 0.05, -0.07, 0.08, -0.12, 0.06, 0.045, colour), *[(ear, colour) for ear in ears],
            (c.ellipse(0, -0.11, 0.10, 0.09), colour), (c.ellipse(0.01 * side, -0.20, 0.12, 0.105), colour), outline=OUTLINE)
    c.paint(*[(c.ellipse(s * 0.13, -0.295, 0.05, 0.05), PINK) for s in (-1, 1)], (c.ellipse(0, -0.085, 0.06, 0.055), pale))
    eyes(c, 0.03 * side, -0.215, side)
    c.paint((c.ellipse(0.075 * side, -0.15, 0.022, 0.018), INK))


@lru_cache(maxsize=4096)
def sprite(who, colour, pose_index, height):
    """A character in a pose: colours premultiplied by alpha [h, w, 3], 1 - alpha [h, w, 1], the feet's (row, column)."""
    pixel = 1 / height
    rows, columns = int(0.62 * height), int(0.50 * height) // 2 * 2
    canvas = Canvas(rows, columns, pixel, left=-columns / 2 * pixel, top=-0.60)
    draw = {"cat": draw_cat, "mouse": draw_mouse}[CHARACTERS[who]]
    draw(canvas, CHARACTER_COLOURS[colour], POSES[pose_index // 2], 1 if pose_index % 2 else -1)
    return canvas.rgba[..., :3], 1 - canvas.rgba[..., 3:] / 255, (0.60 * height, columns // 2)


def paste(frame, picture, clear, row, column):
    """frame = picture over frame, with the picture's corner at (row, column), cut at the frame's edges."""
    rows, columns = frame.shape[:2]
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + picture.shape[0], rows), min(column + picture.shape[1], columns)
    if top < bottom and left < right:
        part = np.s_[top - row:bottom - row, left - column:right - column]
        frame[top:bottom, left:right] = frame[top:bottom, left:right] * clear[part] + picture[part] + 0.5


def render_scene(episode, scene, height=128, width=192):
    """One scene as it is shot, uint8 [48 segments + 1, height, width, 3]."""
    background = draw_background(scene.room, episode.rooms[scene.room], height, width)
    frames = repeat(background, "h w c -> t h w c", t=len(scene.feet)).copy()
    for frame, feet, poses in zip(frames, scene.feet, scene.poses.tolist()):
        for who, (x, y), pose in zip(CHARACTERS, feet, poses):
            if x == x:                                                        # NaN when away
                picture, clear, (row, column) = sprite(who, episode.colours[who], pose, height)
                paste(frame, picture, clear, round(y * height - row), round(x * height - column))
    return frames


def render(episode, height=128, width=192):
    """The episode's frames, uint8 [48 S + 1, height, width, 3]."""
    return join_scenes([render_scene(episode, scene, height, width) for scene in episode.scenes])


def write_video(path, frames, fps=FPS):
    """Writes uint8 frames [n, height, width, 3] as h264 that any player opens."""
    import imageio
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=None, macro_block_size=2, ffmpeg_log_level="error",
                            output_params=["-crf", "17", "-preset", "veryfast", "-threads", "1"]) as writer:
        for frame in frames:
            writer.append_data(frame)


def write_episode(out, seed, segments):
    """Writes one episode as NAME.mp4 and NAME.json, unless a complete one is there; the JSON comes last."""
    video, board = out / f"episode-{seed:07d}.mp4", out / f"episode-{seed:07d}.json"
    world = episode(seed, segments)
    bare = [segment.text.removeprefix(START).removesuffix(END) for segment in world.segments]
    scenes, start = [], 0.0
    for scene in world.scenes:
        end = start + len(scene.feet) / FPS
        scenes.append({"start": start, "end": end, "segments": bare[scene.first:scene.first + scene.segments]})
        start = end
    text = json.dumps(scenes, indent=1) + "\n"
    if video.exists() and board.exists() and board.read_text() == text:
        return
    with atomic(video) as partial:
        write_video(partial, (frame for scene in world.scenes for frame in render_scene(world, scene)))
    with atomic(board) as partial:
        partial.write_text(text)


def render_world(out, episodes, segments=21, seed=0):
    """Writes the episodes of seeds seed ... seed + episodes - 1 into the folder `out`; finished ones are kept."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    in_parallel(lambda number: write_episode(out, number, segments), range(seed, seed + episodes), "render", "episode")


# 4. The codec -----------------------------------------------------------------------------------------------

CODEC_FILE = Path(__file__).parent / "assets" / "pocket_codec.safetensors"


class Residual(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.to_inner = nn.Conv2d(width, inner, 3, padding=1)
        self.to_width = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return x + self.to_width(F.silu(self.to_inner(F.silu(x))))


def up(width, out):
    return nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.PixelShuffle(2))


def down(width, out):
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))


def as_input(groups):
    return (groups.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)


def as_frames(groups):
    pixels = ((groups + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "k (t c) h w -> (k t) h w c", c=3)


class PocketCodec(nn.Module):
    """DOC"""
    height, width, channels, down_space, down_time = 64, 96, 16, 8, 4

    def __init__(self, path=CODEC_FILE):
        super().__init__()
        self.encoder = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(192, 48, 1), Residual(48, 32), down(48, 96),
                                     Residual(96, 48), nn.Conv2d(96, self.channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(self.channels, 128, 3, padding=1), Residual(128, 64), up(128, 64),
                                     Residual(64, 48), up(64, 40), Residual(40, 40), up(40, 12))
        self.to(memory_format=torch.channels_last)
        if path is not None:
            self.load(Path(path))

    def load(self, path):
        if not path.exists():
            raise UserError(f"{path}: the codec's weights are missing, make them with python dataset.py --train_codec")
        with safe_open(path, "pt") as file:
            self.scale = float(file.metadata()["scale"])
            self.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        self.id = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, frames, batch=16):
        """uint8 frames [4 k + 1, 64, 96, 3] -> float32 latents [k + 1, 16, 8, 12], of standard deviation about 1."""
        frames = torch.as_tensor(frames)
        if frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3) or len(frames) % self.down_time != 1:
            raise ValueError(f"frames must be [4 k + 1, {self.height}, {self.width}, 3], not {list(frames.shape)}")
        groups = torch.cat([frames[:1].expand(self.down_time, -1, -1, -1), frames[1:]])
        groups = rearrange(groups, "(k t) h w c -> k (t c) h w", t=self.down_time)
        return torch.cat([self.encoder(as_input(part)) for part in groups.split(batch)]) * self.scale

    @torch.no_grad()
    def decode(self, latents, batch=16):
        """Latents [T, 16, 8, 12] -> uint8 frames [4 (T - 1) + 1, 64, 96, 3], a numpy array."""
        parts = [as_frames(self.decoder(part / self.scale)) for part in latents.float().split(batch)]
        return torch.cat(parts)[self.down_time - 1:].numpy()



# TRAIN_CODEC


# 5. The text encoder ----------------------------------------------------------------------------------------


@lru_cache(maxsize=100_000)
def word_vector(word, dim):
    """A fixed Gaussian vector for any word, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def sinusoids(length, dim):
    """The positions of Attention Is All You Need, float32 [length, dim]."""
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class PocketText:
    """The text encoder in place of T5: a fixed vector a word plus its position; unknown words are fine."""

    def __init__(self, length=40, dim=64):
        self.length, self.dim = length, dim
        self.id = f"pocket-words-{length}x{dim}"
        self.positions = sinusoids(length, dim)

    def words(self, text):
        return re.findall(rf"{START}|{END}|[^\W_]+(?:['’][^\W_]+)*", text.lower())

    def encode(self, texts, where="storyboard"):
        """Paragraphs, one a segment -> float32 [S, N, dim], zeros after the last word; longer ones are cut with a warning."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for number, text in enumerate(texts, 1):
            words = self.words(text)
            if len(words) > self.length:
                tqdm.write(f"warning: {where}, segment {number}: {len(words)} words, cut to {self.length}", file=sys.stderr)
                words = words[:self.length - 1] + words[-1:]                  # keeps the end mark
            for n, word in enumerate(words):
                out[number - 1, n] = word_vector(word, self.dim) + self.positions[n]
        return torch.from_numpy(out)


# 6. Real videos: scenes, segments, latents (3.3) ------------------------------------------------------------

FORMAT = "ttt-minute latents 1"
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".gif"}
SLACK = 2                                   # frames a scene may end beyond the video's last: rounding of its duration


@dataclass(frozen=True)
class Cut:
    """A scene of a user's video after trimming: frames begin ... begin + 48 * len(paragraphs) - 1 at 16 fps."""
    begin: int
    paragraphs: tuple


def read_cuts(board, notes):
    """Reads NAME.json: (cuts, the frame at which the last scene ends). Dropped scenes are added to `notes`."""
    scenes, cuts, before = read_json(read_text(board), board.name), [], 0.0
    if not isinstance(scenes, list) or not scenes:
        raise UserError(f"{board.name}: must be a list of scenes, each with start, end and segments")
    for number, scene in enumerate(scenes, 1):
        where = f"{board.name}, scene {number}"
        start, end, paragraphs = check_scene(scene, where)
        if start < before:
            raise UserError(f"{where}: starts at {start:g} s, before the scene ahead of it has ended ({before:g} s)")
        before = end
        begin, frames = round(start * FPS), round(end * FPS) - round(start * FPS)
        count = frames // SEGMENT
        if count == 0:
            notes.append(f"{where}: dropped, {end - start:g} s is shorter than a segment of {SECONDS} s")
        elif count != len(paragraphs):
            raise UserError(f"{where}: {end - start:g} s hold {count} segments of {SECONDS} s, but it has {len(paragraphs)} paragraphs")
        else:
            cuts.append(Cut(begin + (frames - SEGMENT * count) // 2, tuple(paragraphs)))   # equal trim at both ends
    if not cuts:
        raise UserError(f"{board.name}: nothing is left, every scene is shorter than {SECONDS} s")
    return cuts, round(before * FPS)


def check_scene(scene, where):
    """(start, end, paragraphs) of a scene object, types checked, scene marks taken off the paragraphs."""
    if not isinstance(scene, dict) or not {"start", "end", "segments"} <= scene.keys():
        raise UserError(f"{where}: needs start and end (seconds) and segments (a list of paragraphs)")
    start, end, segments = scene["start"], scene["end"], scene["segments"]
    numbers = all(type(value) in (int, float) and np.isfinite(value) for value in (start, end))
    if not numbers or not 0 <= start < end:
        raise UserError(f"{where}: start {start!r} and end {end!r} must be seconds with 0 <= start < end")
    if not isinstance(segments, list):
        raise UserError(f"{where}: segments must be a list of paragraphs")
    paragraphs = []
    for number, text in enumerate(segments, 1):
        text = text.get("text") if isinstance(text, dict) else text
        if not isinstance(text, str) or not text.replace(START, "").replace(END, "").strip():
            raise UserError(f"{where}, paragraph {number}: must be text that is not empty")
        check_marks(text, f"{where}, paragraph {number}")
        paragraphs.append(" ".join(text.replace(START, " ").replace(END, " ").split()))
    return start, end, paragraphs


def read_frames(video, height, width):
    """Yields uint8 [height, width, 3] at 16 fps: scaled to cover the size, then cropped around the centre."""
    import imageio_ffmpeg
    filters = (f"fps={FPS},scale={width}:{height}:force_original_aspect_ratio=increase:flags=area,crop={width}:{height}")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(video), "-map", "0:v:0",
               "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    size, count = height * width * 3, 0
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, bufsize=16 * size)
        try:
            while len(data := process.stdout.read(size)) == size:
                count += 1
                yield rearrange(np.frombuffer(data, np.uint8), "(h w c) -> h w c", h=height, w=width)
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        reason = complaints.read().decode(errors="replace").strip().splitlines()
    if count == 0:
        raise UserError(f"{video.name}: does not decode ({reason[-1] if reason else 'no video stream'})")


def cut_segments(frames, cuts, last, name):
    """Yields the 49 frames of every segment of the cuts: its own 48 and the one that follows it in the file.

    Frames are read one by one, so memory does not grow with the video's length.
    """
    def padded():
        for frame in frames:
            yield frame
        yield from [frame] * (SLACK + 1)                            # where the file has no more, its last frame again

    starts = {cut.begin + SEGMENT * i for cut in cuts for i in range(len(cut.paragraphs))}
    block = []
    for position, frame in enumerate(padded()):
        if len(block) == SEGMENT:
            yield np.stack([*block, frame])
            block = []
        if position in starts or block:
            block.append(frame)
        if position >= last:
            return
    found = (position - SLACK) / FPS
    raise UserError(f"{name}: the video ends or stops decoding after {found:.1f} s, but its scenes last until {last / FPS:.1f} s")


@dataclass(frozen=True)
class Job:
    """One video to ingest; `source` tells whether a file on disk was made from the same video, storyboard and encoders."""
    video: Path
    target: Path
    cuts: tuple
    last: int
    source: str

    @property
    def texts(self):
        return [text for cut in self.cuts for text in mark_scene(cut.paragraphs)]


def plan_job(video, out, codec, text_encoder):
    """Checks the storyboard of a video before anything is decoded: (job, notes about dropped scenes)."""
    board, notes = video.with_suffix(".json"), []
    if not board.exists():
        raise UserError(f"{video.name}: has no storyboard, {board.name} must be beside it")
    cuts, last = read_cuts(board, notes)
    stat, words = video.stat(), hashlib.sha256(board.read_bytes()).hexdigest()[:12]
    source = f"{video.name} {stat.st_size} {stat.st_mtime_ns} {words} {codec.id} {text_encoder.id}"
    return Job(video, out / f"{video.stem}.safetensors", tuple(cuts), last, source), notes


def read_metadata(path):
    """The metadata of an ingested file; an empty dict when there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def ingest_video(job, codec, text_encoder):
    """One video -> one file of latents and text embeddings, unless it is there already."""
    if read_metadata(job.target).get("source") == job.source:
        return
    frames = read_frames(job.video, codec.height, codec.width)
    segments = cut_segments(frames, job.cuts, job.last, job.video.name)
    latents = [codec.encode(segment).half() for segment in segments]
    text = text_encoder.encode(job.texts, where=job.video.name).half()
    metadata = {"format": FORMAT, "source": job.source, "codec": codec.id, "scale": str(codec.scale), "fps": str(FPS),
                "text_encoder": text_encoder.id, "segments": str(len(latents)),
                "scenes": json.dumps([cut.paragraphs for cut in job.cuts])}
    with atomic(job.target) as partial:
        save_file({"latents": torch.stack(latents), "text": text}, partial, metadata)


def ingest(videos, out, codec, text_encoder):
    """Takes every video of the folder `videos`, NAME.mp4 with NAME.json beside it, to latents in the folder `out`.

    `codec` has height, width, id, scale and encode; `text_encoder` has id and encode. Files that are already there
    are kept. A bad video does not stop the others; a UserError at the end names every one that was left out.
    """
    videos, out = Path(videos), Path(out)
    if not videos.is_dir():
        raise UserError(f"{videos}: no such folder")
    paths = sorted(path for path in videos.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != ".")
    if not paths:
        raise UserError(f"{videos}: no videos in this folder")
    jobs, problems = [], []
    for path in paths:
        try:
            job, notes = plan_job(path, out, codec, text_encoder)
            jobs.append(job)
        except UserError as error:
            problems.append(str(error))
            continue
        for note in notes:
            tqdm.write(note)

    def work(job):
        try:
            ingest_video(job, codec, text_encoder)
        except UserError as error:
            problems.append(str(error))

    in_parallel(work, jobs, "ingest", "video")
    write_index(out, codec, text_encoder)
    if problems:
        raise UserError(f"{len(problems)} of {len(paths)} videos were left out: " + "; ".join(problems))


def write_index(out, codec, text_encoder):
    """index.json: what the folder holds. Files made by another codec or text encoder are not listed."""
    files = []
    for path in sorted(out.glob("*.safetensors")):
        metadata = read_metadata(path)
        if (metadata.get("codec"), metadata.get("text_encoder")) == (codec.id, text_encoder.id):
            files.append({"file": path.name, "segments": int(metadata["segments"])})
    index = {"format": FORMAT, "codec": codec.id, "scale": codec.scale, "fps": FPS,
             "latents": [13, codec.channels, codec.height // codec.down_space, codec.width // codec.down_space],
             "text_encoder": text_encoder.id, "text": [text_encoder.length, text_encoder.dim], "videos": files}
    with atomic(out / "index.json") as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n")


# 7. The loader ----------------------------------------------------------------------------------------------


class Runs:
    """Every run of `segments` consecutive segments of the ingested videos in `folder`; len() counts them.

    Raises UserError: folder or index missing, made by another codec, a damaged file, no video long enough.
    """
    in_memory = 1 << 30                                             # bytes up to which everything is kept in memory

    def __init__(self, folder, segments, codec_id=None):
        self.folder, self.segments = Path(folder), segments
        if not (self.folder / "index.json").exists():
            raise UserError(f"{folder}: no dataset here, make one with python dataset.py --ingest VIDEOS --out {folder}")
        self.index = read_json(read_text(self.folder / "index.json"), f"{folder}/index.json")
        if codec_id is not None and self.index["codec"] != codec_id:
            raise UserError(f"{folder}: made by codec {self.index['codec']}, not {codec_id}; ingest the videos again")
        videos = self.index["videos"]
        self.runs = [(i, start) for i, video in enumerate(videos) for start in range(video["segments"] - segments + 1)]
        if not self.runs:
            longest = max((video["segments"] for video in videos), default=0)
            raise UserError(f"{folder}: no video has {segments} segments, the longest has {longest}")
        size = sum(video["segments"] for video in videos) * 2 * np.prod(self.index["latents"])
        self.videos = [self.open(video, whole=size < self.in_memory) for video in videos]

    def open(self, video, whole):
        """(latents [S, 13, C, h, w], text [S, N, dim]), float16: tensors, or slices that read from the disk."""
        path = self.folder / video["file"]
        try:
            file = safe_open(path, "pt")
            latents, text = [file.get_slice(name) for name in ("latents", "text")]
            shapes = ([video["segments"], *self.index["latents"]], [video["segments"], *self.index["text"]])
            if (latents.get_shape(), text.get_shape()) != shapes:
                raise UserError(f"{path}: its shapes are not those of index.json; ingest the videos again")
            return (latents[:], text[:]) if whole else (latents, text)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: missing or damaged ({error}); ingest the videos again") from None

    def __len__(self):
        return len(self.runs)

    def run(self, number):
        """One run: a run drops the first latent of all its segments but the first."""
        i, start = self.runs[number]
        latents, text = [tensor[start:start + self.segments] for tensor in self.videos[i]]
        rest = rearrange(latents[:, 1:], "S t C h w -> (S t) C h w")
        return torch.cat([latents[0, :1], rest]), text                        # [12 S + 1, C, h, w], [S, N, dim]

    def batch(self, indices):
        """latents float32 [B, 12 S + 1, C, h, w] and text float32 [B, S, N, dim] of the runs of these numbers."""
        latents, texts = zip(*[self.run(number) for number in indices])
        return torch.stack(latents).float(), torch.stack(texts).float()


# 8. The command line ----------------------------------------------------------------------------------------


def main():
    parser = Parser(prog="dataset.py", description="The pocket world, and real videos, as data for ttt_minute.py.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--render", type=int, metavar="N", help="write N episodes of the pocket world into --out")
    action.add_argument("--ingest", metavar="VIDEOS", help="take a folder of NAME.mp4 and NAME.json to latents in --out")
    action.add_argument("--storyboard", type=int, metavar="SEED", help="print a storyboard that training never sees")
    action.add_argument("--train_codec", action="store_true", help="make assets/pocket_codec.safetensors again")
    parser.add_argument("--out", metavar="DIR", help="the folder to write to")
    parser.add_argument("--segments", type=int, default=21, help="3-second segments of an episode, 1 to 21 (default 21)")
    parser.add_argument("--seed", type=int, default=0, help="the first episode's seed (default 0)")
    args = parser.parse_args()
    if not 1 <= args.segments <= 21:
        parser.error(f"--segments {args.segments}: an episode has 1 to 21 segments")
    if min(args.seed, args.storyboard or 0) < 0 or (args.render is not None and args.render < 1):
        parser.error("seeds count from 0 and --render from 1")
    if (args.render or args.ingest) and not args.out:
        parser.error("--out DIR is missing, the folder to write to")
    if args.render:
        render_world(args.out, args.render, args.segments, args.seed)
    elif args.ingest:
        ingest(args.ingest, args.out, PocketCodec(), PocketText())
    elif args.train_codec:
        train_codec()
    else:
        print(storyboard_text(episode(TEST_SEEDS + args.storyboard, args.segments)), end="")


if __name__ == "__main__":
    from dataset import main, run_main                              # the same UserError as everybody else's
    run_main(main)
