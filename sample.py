"""From a storyboard to a video.

    python sample.py                                                        # a minute, by the weights in assets/
    python sample.py --stage 9s                                             # a storyboard that training never saw
    python sample.py --stage 9s --storyboard story.txt --out video.mp4      # your own, in Format 3, JSON or JSONL
    python sample.py --layer local --seed 7                                 # another story, by local attention
    python sample.py --stage 9s --evaluate                                  # the paper's four axes, measured in pixels
    python sample.py --stage 18s --compare --layers local ttt_mlp gated_deltanet

Writes the video as mp4 and GIF, and a contact sheet as PNG: a row a scene, each frame with its time.
"""

import dataclasses
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from tqdm import tqdm

import dataset
from dataset import FPS, SEGMENT, Parser, UserError, atomic, run_main
from ttt_minute import (ASSETS, LAYERS, PRESETS, STAGES, Config, add_device_flags, add_noise, alphas_cumprod, build, check_devices,
                        find_checkpoint, join, load_checkpoint, pick_device, read_checkpoint, run_folder, save_model, together, whole_video)

# ----------------------------------------------------------------------------------------------------
# 1. Diffusion backwards (appendix A)
# ----------------------------------------------------------------------------------------------------


def guidance_scale(i, steps, low=1.0, high=4.0, power=5.0):
    """Dynamic guidance at step i of 0 .. steps-1: rises from low to high along a cosine, late. One step means low."""
    progress = i / (steps - 1) if steps > 1 else 0.0
    return low + (high - low) * (1 - math.cos(math.pi * progress ** power)) / 2


@torch.no_grad()
def ddim(model, noise, text, negative=None, steps=50, guidance=(1.0, 4.0), power=5.0):
    """DDIM with v-prediction: noise [B, T, C, h, w] and text [B, S, N, text_dim] -> latents [B, T, C, h, w].

    Timesteps are trailing (999, 979, ... for 50 steps). `negative` [B, S, N, text_dim] is what to move away from, zeros
    where there is none: what prompt dropout trained. DIFF: the published code encodes the empty string, and samples
    with a stochastic solver whose guidance reads a timestep where its formula wants a step index; this is the paper's text.
    """
    alpha_bar = alphas_cumprod(model.config.snr_shift)
    timesteps = torch.arange(1000, 0, -1000 / steps).round().long() - 1
    negative = torch.zeros_like(text) if negative is None else negative
    x = noise
    for i, t in enumerate(tqdm(timesteps.tolist(), desc="sample", unit="step", leave=False, dynamic_ncols=True)):
        batch_t = torch.full((len(x),), t, device=x.device)
        w = guidance_scale(i, steps, *guidance, power)
        v = whole_video(model, x, text, batch_t).float()
        if w != 1:
            v_negative = whole_video(model, x, negative, batch_t).float()
            v = v_negative + w * (v - v_negative)
        a, s = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
        x_0, e = a * x - s * v, a * v + s * x
        next_bar = alpha_bar[timesteps[i + 1]].item() if i + 1 < steps else 1.0
        x = math.sqrt(next_bar) * x_0 + math.sqrt(1 - next_bar) * e
    return x


def embed(board, text_encoder, where="storyboard"):
    """A storyboard (a list of Segments) -> text and negative, [S, N, dim] each; zeros where a segment has no negative."""
    text = text_encoder.encode([segment.text for segment in board], where=where)
    negative = torch.zeros_like(text)
    if own := [i for i, segment in enumerate(board) if segment.negative]:
        negative[own] = text_encoder.encode([board[i].negative for i in own], where=f"{where}, negatives")
    return text, negative


def generate(model, text, negative=None, seed=0, **settings):
    """Text and negative [S, N, dim] -> latents [T, C, h, w]; everything random comes from the seed."""
    config, device = model.config, next(model.parameters()).device
    shape = 1, 12 * len(text) + 1, config.channels, config.height, config.width
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    negative = None if negative is None else negative[None].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        latents = ddim(model, noise, text[None].to(device), negative, **settings)[0]
    if not latents.isfinite().all():
        raise UserError("sampling gave numbers that are not finite; the checkpoint is not usable, train its stage again")
    return latents.cpu()


# ----------------------------------------------------------------------------------------------------
# 2. Pictures and video
# ----------------------------------------------------------------------------------------------------


def resize(frames, factor):
    """uint8 frames [n, h, w, 3] -> [n, factor h, factor w, 3], smoothly."""
    from PIL import Image
    size = round(frames.shape[2] * factor), round(frames.shape[1] * factor)
    return np.stack([Image.fromarray(frame).resize(size, Image.LANCZOS) for frame in frames])


def contact_sheet(frames, board, columns=6):
    """One row a scene: its first words, then frames evenly spread over it, each with its time in seconds."""
    from PIL import Image, ImageDraw
    height, width = frames.shape[1:3]
    factor = max(1, round(192 / width))
    height, width = height * factor, width * factor
    scenes = sorted({segment.scene for segment in board})
    margin, caption = 4, 16
    row = height + 2 * caption + margin
    sheet = Image.new("RGB", (columns * (width + margin) + margin, len(scenes) * row + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for y, scene in enumerate(scenes):
        own = [i for i, segment in enumerate(board) if segment.scene == scene]
        words = board[own[0]].text.removeprefix(dataset.START).removesuffix(dataset.END).strip()
        while pen.textlength(words) > sheet.width - 2 * margin:
            words = words[:-5].rstrip(" .") + " ..."
        pen.text((margin, y * row + margin), words, fill="black")
        first = SEGMENT * own[0] + 1                          # frame 48 i is still the segment before's
        for x, frame in enumerate(np.linspace(first, SEGMENT * (own[-1] + 1), columns).round().astype(int)):
            corner = margin + x * (width + margin), y * row + caption + margin
            sheet.paste(Image.fromarray(resize(frames[frame:frame + 1], factor)[0]), corner)
            pen.text((corner[0], corner[1] + height), f"{frame / FPS:.1f} s", fill="gray")
    return sheet


def save_video(frames, board, path):
    """Write path (.mp4), and beside it the same as .gif (8 frames a second) and a contact sheet as .png."""
    path = Path(path)
    factor = max(1, round(384 / frames.shape[2]))
    with atomic(path) as temporary:
        dataset.write_video(temporary, resize(frames, factor))
    save_gif(resize(frames[::2], max(1, factor // 2)), path.with_suffix(".gif"))
    with atomic(path.with_suffix(".png")) as temporary:
        contact_sheet(frames, board).save(temporary)


def save_gif(pictures, path):
    """Write pictures as a GIF, 8 a second."""
    import imageio
    with atomic(path) as temporary:
        imageio.mimwrite(temporary, pictures, duration=2000 / FPS, loop=0)


@contextmanager
def plot(path, **labels):
    """Axes to draw on; the plot is written at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4))
    yield axes
    axes.set(**labels)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_loss(folder):
    """loss.png from a stage's log.jsonl."""
    loss = np.array([json.loads(line)["loss"] for line in (folder / "log.jsonl").open()])
    window = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.ones(window) / window, mode="valid")
    title = f"{folder.parent.name}, stage {folder.name}"
    with plot(folder / "loss.png", xlabel="step", ylabel="loss (mean squared error of v)", title=title, ylim=(0, None)) as axes:
        axes.plot(loss, color="0.8", linewidth=0.8, label="each step")
        axes.plot(np.arange(window - 1, len(loss)), mean, color="tab:blue", label=f"mean of {window} steps")


def held_out(segments, seed=0):
    """A storyboard of the pocket world that no training run has seen."""
    return list(dataset.episode(dataset.TEST_SEEDS + seed, segments).segments)


def encoders_of(model, path, args, device):
    """The codec and the text encoder a model was trained with, or a UserError: others would give a wrong video without a word."""
    config = model.config
    pair = dataset.encoders_of(model.encoders, path, args.vae, args.text_encoder, args.vae_scale, config.frame_size, config.text_size, device)
    for encoder, flag, kind in zip(pair, ("--vae", "--text_encoder"), model.encoders):
        if encoder is None:
            raise UserError(f"{flag} FOLDER is missing: {path} was trained with {model.encoders[kind]}")
    return pair


def check_boards(boards, text_encoder, length, where):
    """What a language model wrote, before a GPU hour is spent on it: segments, scenes, and the tokens of every text."""
    for number, board in enumerate(boards, 1):
        tokens = [len(text_encoder.words(segment.text)) for segment in board]
        title = where if len(boards) == 1 else f"{where}, video {number}"
        print(f"{title}: {len(board)} segments, {3 * len(board)} seconds, {board[-1].scene + 1} scenes, {min(tokens)} to {max(tokens)} tokens a text")
        for i, (segment, count) in enumerate(zip(board, tokens), 1):
            cut = f"  <- {count - length} too many, the end would be cut off" if count > length else ""
            print(f"  segment {i:3}  scene {segment.scene + 1:3}  {count:4} of {length} tokens{cut}")
    if not all(len(text_encoder.words(segment.text)) <= length for board in boards for segment in board):
        raise UserError(f"{where}: texts are longer than the encoder's {length} tokens; shorten those marked above")


def show_stage(model, folder, segments, codec, text_encoder, runs, devices):
    """The sample that ends a training stage, sample.mp4, .gif and .png beside its checkpoint: in the pocket world of a storyboard
    it has never seen, otherwise of the first storyboard in the data. `codec` and `text_encoder` are None where they are not at hand."""
    if not codec or not (text_encoder or runs):
        return print("no sample: CogVideoX's VAE is not at hand; name it with --vae FOLDER (and --data DIR), or use sample.py")
    if text_encoder:
        board = held_out(segments, model.config.seed)
        text, _ = embed(board, text_encoder)
    else:
        board, text = runs.storyboard(0), runs.run(0)[1].float()
    latents = generate(model.eval(), text, seed=model.config.seed)
    devices.first(lambda: save_video(codec.decode(latents), board, folder / "sample.mp4"))
    print(f"look at {folder / 'sample.png'}")


# ----------------------------------------------------------------------------------------------------
# 3. Evaluation: the paper's four axes (4.2), measured in pixels
#
# The pocket world is drawn from known shapes, so a video of it can be read back: which room, wall and furniture the median
# picture of a segment fits best, and which sprite, in which pose and colour, fits best where in every drawing.
# ----------------------------------------------------------------------------------------------------

AXES = ("text following", "motion naturalness", "aesthetics", "temporal consistency")
POSES = ["stand", "air"] + [f"{verb}{phase}" for verb in ("walk", "wave") for phase in range(4)]
THERE = 0.035               # mean squared error (of 0 ... 1) below which a sprite counts as seen
LIKE = 0.12                 # error of a pixel, of 0 ... 1, up to which it counts as drawn in the world's colours and edges


@dataclass(frozen=True)
class Track:
    """A character in the 12 drawings of a segment: feet in picture heights [12], poses, how well it fits [12], its colour."""
    x: np.ndarray
    y: np.ndarray
    poses: list
    sides: list
    error: np.ndarray
    colour: str

    @property
    def there(self):
        return float(np.mean(self.error < THERE)) > 0.5

    def deed(self):
        """(verb, from, to), as the text would say it."""
        start, end = (min(dataset.PLACES, key=lambda place: abs(dataset.PLACES[place] - x)) for x in (self.x[0], self.x[-1]))
        if start != end:
            done = np.abs(self.x - self.x[0]) > 0.85 * abs(self.x[-1] - self.x[0])
            return "run" if {start, end} == {"left", "right"} or done.argmax() < 8 else "walk", start, end
        if self.y.max() - self.y.min() > 0.07:
            return "jump", start, end
        return "wave" if sum(pose.startswith("wave") for pose in self.poses) > 3 else "stand", start, end


@dataclass(frozen=True)
class Seen:
    """What a segment shows: the room, its hidden attributes, and everybody who might be there."""
    room: str
    hidden: dataset.Room
    tracks: dict                # who -> Track
    like: float                 # fraction of pixels as the world would draw what was seen


def half(pictures):
    """float32 [..., h, w, c] at half the size."""
    return reduce(np.float32(pictures), "... (h a) (w b) c -> ... h w c", "mean", a=2, b=2)


@functools.lru_cache(maxsize=None)
def backgrounds():
    """Every room with every wall and furniture, float [rooms, walls, furniture, colours, 64, 96, 3] of 0 ... 1."""
    rooms = [[[[dataset.draw_background(name, dataset.Room(wall, kind, colour)) for colour in dataset.FURNITURE_COLOURS]
               for kind in dataset.FURNITURE] for wall in dataset.WALL_COLOURS] for name in dataset.ROOMS]
    return half(rooms) / 255


def read_room(frames):
    """The room that the median of uint8 frames [n, 64, 96, 3] fits best: (name, dataset.Room)."""
    picture, known = np.median(frames, axis=0) / 255, backgrounds()
    error = np.abs(known - np.float32(picture)).clip(max=0.3).mean(axis=(-3, -2, -1))         # characters count little
    room, wall, kind, colour = np.unravel_index(error.argmin(), error.shape)
    return list(dataset.ROOMS)[room], dataset.Room(list(dataset.WALL_COLOURS)[wall], dataset.FURNITURE[kind], list(dataset.FURNITURE_COLOURS)[colour])


@functools.lru_cache(maxsize=None)
def sprites(who):
    """All sprites of a character at half size: keys (colour, pose, right), colours [K, 3, 40, 32] and masks [K, 1, 40, 32]."""
    keys = [(colour, pose, right) for colour in dataset.CHARACTER_COLOURS for pose in POSES for right in (False, True)]
    drawn = [dataset.sprite(who, *key) for key in keys]
    paint, clear = (np.pad(np.stack(x), ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=fill) for x, fill in zip(zip(*drawn), (0, 1)))
    paint, clear = (rearrange(torch.from_numpy(half(x)), "k h w c -> k c h w") for x in (paint / 255, clear))
    mask = (clear < 0.5).float()
    return keys, paint / (1 - clear).clamp_min(0.5) * mask, mask


@torch.no_grad()
def read_track(frames, who, open_view):
    """The sprite that fits best in each of uint8 frames [n, 64, 96, 3], its colour the same in all of them: a Track.

    `open_view` [n, 64, 96] is 0 where somebody else stands in front: these pixels say nothing.
    """
    keys, paint, mask = sprites(who)
    top, colours = 4, len(dataset.CHARACTER_COLOURS)          # rows above are never reached
    picture = rearrange(torch.from_numpy(frames[:, top:]).float() / 255, "n h w c -> n c h w")
    view = F.pad(torch.from_numpy(open_view[:, None, top:]), (8, 8, 0, 4))
    picture = F.pad(picture, (8, 8, 0, 4)) * view
    # Sum over a sprite's visible pixels of (picture - paint)^2, for all sprites and places at once.
    energy = F.conv2d(picture.square().sum(1, keepdim=True), mask[:len(mask) // colours]).repeat(1, colours, 1, 1)
    pixels = F.conv2d(view, mask[:len(mask) // colours]).repeat(1, colours, 1, 1)
    error = energy - 2 * F.conv2d(picture, paint) + F.conv2d(view, paint.square().sum(1, keepdim=True))
    error = torch.where(pixels > 0.3 * mask.sum((1, 2, 3))[:, None, None], error / (3 * pixels), 1.0)         # [n, K, y, x]
    best = rearrange(error, "n (colour k) y x -> colour n (k y x)", colour=colours).min(-1)
    colour = best.values.clamp(max=2 * THERE).mean(1).argmin().item()
    width, height = error.shape[-1], error.shape[-2]
    k, place = np.divmod(best.indices[colour].numpy(), width * height)
    y, x = np.divmod(place, width)
    found = [keys[colour * 2 * len(POSES) + i] for i in k]
    feet_y, feet_x = dataset.FEET_AT
    return Track((2 * (x - 8) + feet_x) / dataset.HEIGHT, (2 * (y + top) + feet_y) / dataset.HEIGHT, [pose for _, pose, _ in found],
                 [right for _, _, right in found], best.values[colour].numpy(), keys[colour * 2 * len(POSES)][0])


def read_segment(frames):
    """uint8 frames [48, 64, 96, 3] -> Seen."""
    room, hidden = read_room(frames)
    drawings = frames[1::4]                                   # one of the four frames of every drawing
    size = len(drawings), dataset.HEIGHT, dataset.WIDTH, 3
    white, drawn, tracks = np.full(size, 255, np.uint8), repeat(dataset.draw_background(room, hidden), "h w c -> n h w c", n=size[0]).copy(), {}
    for who in sorted(dataset.CHARACTERS, reverse=True):      # Pip is in front
        black = np.zeros(size, np.uint8)
        for t, other in ((t, other) for t in range(size[0]) for other in tracks):
            paste_track(black[t], tracks, other, t)
            paste_track(white[t], tracks, other, t)
        tracks[who] = read_track(drawings, who, np.float32(half(white)[..., 0] - half(black)[..., 0] > 128))
    for t, who in ((t, who) for t in range(size[0]) for who in sorted(tracks)):
        paste_track(drawn[t], tracks, who, t)
    return Seen(room, hidden, tracks, float(np.mean(np.abs(half(drawn) - drawings).mean(-1) / 255 < LIKE)))


def paste_track(picture, tracks, who, t):
    """Draws a character where it was seen in drawing t, if it was."""
    track = tracks[who]
    if track.error[t] < THERE:
        dataset.paste(picture, {who: (track.x[t], track.y[t], track.poses[t], track.sides[t])}, {who: track.colour})


def evaluate(frames, episode):
    """The four axes of a video of a held-out episode, uint8 [48 S + 1, h, w, 3], read at 64 x 96, and its returns.

    Returns ({axis: score in 0 ... 1}, [(who or which room, segments since its first appearance, fraction of hidden attributes
    that came back)]).
    """
    frames = resize(frames, 64 / frames.shape[1])
    seen = [read_segment(frames[SEGMENT * i + 1:SEGMENT * (i + 1) + 1]) for i in range(len(episode.segments))]
    text, motion, returns, first = [], [], [], {}
    for scene in episode.scenes:
        for i in range(scene.first, scene.first + scene.segments):
            now, truth = seen[i], scene.drawings[dataset.DRAWINGS * (i - scene.first) + 1:][:dataset.DRAWINGS]
            right = [now.room == scene.room]
            for who, track in now.tracks.items():
                right.append(track.there == (who in scene.cast))
                if who in scene.cast:
                    x, y, poses, sides = zip(*[drawing[who] for drawing in truth])
                    wanted = Track(np.array(x), np.array(y), list(poses), list(sides), np.zeros(len(x)), "").deed()
                    right += [track.there and did == meant for did, meant in zip(track.deed(), wanted)]
                    motion.append(natural(track))
            text.append(np.mean(right))
            shown = {scene.room: dataclasses.astuple(now.hidden)} | {who: (now.tracks[who].colour,) for who in scene.cast if now.tracks[who].there}
            for what, attributes in shown.items():
                then, before = first.setdefault(what, (i, attributes))
                if then < i:
                    returns.append((what, i - then, float(np.mean([a == b for a, b in zip(attributes, before)]))))
    scores = np.mean(text), np.mean(motion), np.mean([now.like for now in seen]), np.mean([same for *_, same in returns]) if returns else math.nan
    return dict(zip(AXES, map(float, scores))), returns


CHANCE = {"rooms": (1 / len(dataset.WALL_COLOURS) + 1 / len(dataset.FURNITURE) + 1 / len(dataset.FURNITURE_COLOURS)) / 3,
          "characters": 1 / len(dataset.CHARACTER_COLOURS)}


def evaluate_stage(model, checkpoint, codec, text_encoder, segments, seeds, folder, **settings):
    """Sample and score the held-out storyboards of some seeds: {"videos": what was found in each, "memory": memory_in_loss} and how the stage
    was trained. Writes evaluation.json, consistency.png and the first video, evaluation-SEED.mp4, into the folder. What an
    interrupted run has scored with the same checkpoint and settings is kept."""
    path, made_with = folder / "evaluation.json", {"checkpoint": dataset.short_hash(checkpoint.read_bytes()), "memory": "t, loss, rise, rise by exchange", **settings}
    done = json.loads(path.read_text()) if path.exists() else {}
    if done.get("made_with") != made_with:
        done = {"made_with": made_with, "memory": memory_in_loss(model, codec, text_encoder, segments), "videos": {}}
        for old in folder.glob("evaluation-*.mp4"):           # of another checkpoint or other settings
            old.unlink()
    for seed in seeds:
        video = folder / f"evaluation-{seed}.mp4"
        if str(seed) not in done["videos"] or seed == seeds[0] and not video.exists():
            episode = dataset.episode(dataset.TEST_SEEDS + seed, segments)
            text, _ = embed(episode.segments, text_encoder)
            frames = codec.decode(generate(model, text, seed=seed, **settings))
            scores, returns = evaluate(frames, episode)
            if seed == seeds[0]:
                save_video(frames, episode.segments, video)
            done["videos"][str(seed)] = {"scores": scores, "returns": returns}
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(done) + "\n")
    videos = [done["videos"][str(seed)] for seed in seeds]
    plot_consistency({folder.parent.name: videos}, folder / "consistency.png")
    return dict(videos=videos, memory=done["memory"], **how_trained(checkpoint))


def how_trained(checkpoint):
    """How many steps and minutes a checkpoint's stage took, and the mean of its last 40 losses; None where no log lies beside it."""
    log = checkpoint.with_name("log.jsonl")
    if not log.exists():
        return dict(steps=None, minutes=None, loss=None)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return dict(steps=len(steps), minutes=sum(step["ms"] for step in steps) / 60_000, loss=float(np.mean([step["loss"] for step in steps[-40:]])))


@torch.no_grad()
def memory_in_loss(model, codec, text_encoder, segments, videos=16, levels=(800, 880, 920)):
    """What a network gains from earlier scenes, without sampling. On held-out stories that end where they were before: how much the loss of
    the last segment rises when its place had the hidden attributes of another episode before, and when it had exchanged them with
    another place of the story, which only a memory of whose they were can notice. Returns [(t, loss, rise, rise by exchange)]."""
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    losses = {t: [] for t in levels}
    for episode in stories_that_return(segments, videos):
        place = episode.scenes[-1].room
        neighbour = next(scene.room for scene in reversed(episode.scenes) if scene.room != place)
        other = dataset.episode(episode.seed + segments * videos, segments)
        stranger = dataclasses.replace(episode, colours=other.colours, rooms=other.rooms)
        exchanged = dataclasses.replace(episode, rooms=episode.rooms | {place: episode.rooms[neighbour], neighbour: episode.rooms[place]})
        own, strange, mixed = (codec.encode(dataset.render(story, codec.height, codec.width)) for story in (episode, stranger, exchanged))
        before = torch.arange(len(own))[:, None, None, None] < 12 * (segments - 1)              # but the frame shared with the last segment
        here = torch.zeros_like(before)
        for scene in episode.scenes[:-1]:
            begin, end = 12 * scene.first + (scene.first > 0), 12 * (scene.first + scene.segments) + 1
            here[begin:end] |= scene.room == place
        stories = torch.stack([own, torch.where(here, strange, own), torch.where(before, mixed, own)]).to(device)
        text = embed(episode.segments, text_encoder)[0].expand(3, -1, -1, -1).to(device)
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(episode.seed)).to(device)
        for t in levels:
            batch_t = torch.full((3,), t, device=device)
            x_t, v = add_noise(stories, batch_t, noise, model.config.snr_shift)
            error = (model(x_t, text, batch_t) - v)[:, 12 * segments - 10:]                      # past the shared frame
            losses[t].append(error.square().mean((1, 2, 3, 4)))
    means = {t: torch.stack(found).mean(0).tolist() for t, found in losses.items()}
    return [(t, own, strange - own, mixed - own) for t, (own, strange, mixed) in means.items()]


def stories_that_return(segments, videos):
    """Held-out episodes whose last scene is one segment in a place that was seen before."""
    seeds, found = itertools.count(dataset.TEST_SEEDS), []
    while len(found) < videos:
        episode = dataset.episode(next(seeds), segments)
        *before, last = episode.scenes
        if last.segments == 1 and last.room in (scene.room for scene in before):
            found.append(episode)
    return found


def summary(runs):
    """What a table says of a layer, {line: text}, from its scored stages, one for every seed of training: how it was trained, mean and
    standard error of each axis (over seeds, or over the videos of a single one), how much of what returned came back after so many
    segments and how many returns were seen, and what the loss says of memory, at the middle level of memory_in_loss."""
    lines = {}
    for key, line, digits in ("steps", "steps", 0), ("minutes", "minutes", 1), ("loss", "last 40 losses of training", 3):
        numbers = [run[key] for run in runs]
        lines[line] = "-" if None in numbers else f"{np.mean(numbers):.{digits}f}"
    for axis in AXES:
        scores = np.array([[video["scores"][axis] for video in run["videos"]] for run in runs])
        scores = np.nanmean(scores, axis=1) if len(runs) > 1 else scores[0]
        error = np.nanstd(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else math.nan
        lines[axis] = f"{np.nanmean(scores):.3f} +- {error:.3f}"
    for kind, low, high in ((kind, low, high) for kind in CHANCE for low, high in ((1, 4), (5, 20))):
        same = [same for run in runs for video in run["videos"] for what, distance, same in video["returns"]
                if (what in dataset.ROOMS) == (kind == "rooms") and low <= distance <= high]
        lines[f"{kind} after {low}-{high} (chance {CHANCE[kind]:.2f})"] = f"{np.mean(same):.3f} ({len(same)})" if same else "-"
    t, loss, rise, exchanged = np.mean([run["memory"][len(run["memory"]) // 2] for run in runs], axis=0)
    return lines | {f"loss of a last scene at t {t:.0f}": f"{loss:.3f}", "  after a stranger's colours": f"{rise:+.4f}", "  after exchanged colours": f"{exchanged:+.4f}"}


def print_scores(found):
    """{name: scored stages} as a table, a column each."""
    columns = {name: summary(runs) for name, runs in found.items()}
    print(f"{'':<36}" + "".join(f"{name:>17}" for name in columns))
    for line in next(iter(columns.values())):
        print(f"{line:<36}" + "".join(f"{column[line]:>17}" for column in columns.values()))
    print("+-: standard error over seeds of training, over videos where there is one seed; in brackets: how many returns were seen; last lines:\n"
          "how much the loss rises when the place had a stranger's colours before, and when it had exchanged them with another place")
    if any(column["steps"] == "-" for column in columns.values()):
        print("steps -: no log lies beside these weights; those that ship took more steps than the preset has")


def compare(args, config, names, evaluate_layer):
    """Train what is missing or was interrupted, with every seed of training, score every layer on the same storyboards, and show them
    together: a table, comparison.json, consistency.png, and of the first seed comparison.png with a row a layer and comparison.gif
    with the same story by every layer. A training that fails is named; the others go on."""
    import imageio
    found, videos = {}, {}
    for layer, seed in itertools.product(names, args.train_seeds):
        own = dataclasses.replace(config, layer=layer, seed=seed)
        try:
            path = find_checkpoint(args.out_dir, own, args.stage)
            if not path or args.minutes and path.parent == ASSETS:            # what ships was trained by steps
                train = [sys.executable, Path(__file__).with_name("ttt_minute.py"), "--preset", args.preset, "--stage", args.stage, "--layer", layer,
                         "--seed", seed, "--out_dir", args.out_dir, "--resume"]
                train += ["--minutes", args.minutes] if args.minutes else []
                subprocess.run([*map(str, train), *(["--device", args.device] if args.device else [])], check=True)
                path = find_checkpoint(args.out_dir, own, args.stage)
            given = read_checkpoint(path, whole=False)[1].get("minutes") or None
            if given != args.minutes:
                budget = {minutes: f"for {minutes:g} min" if minutes else "by steps" for minutes in (given, args.minutes)}
                raise UserError(f"{path} was trained {budget[given]}, the others {budget[args.minutes]}; take another --out_dir")
            found.setdefault(layer, []).append(dict(seed=seed, **evaluate_layer(own)))
            if layer not in videos:
                path = run_folder(args.out_dir, own, args.stage) / f"evaluation-{args.seed}.mp4"
                videos[layer] = np.stack(imageio.mimread(path, memtest=False))[:, ::2, ::2]
        except (UserError, subprocess.CalledProcessError) as error:
            print(layer + f" of seed {seed}" * (seed > 0) + f": left out ({error})", file=sys.stderr)
    if not found:
        raise UserError("no layer could be scored")
    folder = Path(args.out_dir) / f"{args.preset}-comparison" / args.stage
    strips = [captioned(layer, np.concatenate(frames[SEGMENT // 2::SEGMENT], axis=1)) for layer, frames in videos.items()]
    with atomic(folder / "comparison.png") as temporary:
        imageio.imwrite(temporary, np.concatenate(strips))
    rows = zip(*(frames[::max(2, len(frames) // 72)] for frames in videos.values()))            # long stories run faster
    save_gif([np.concatenate([captioned(*item) for item in zip(videos, row)], axis=1) for row in rows], folder / "comparison.gif")
    with atomic(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(found) + "\n")
    plot_consistency({layer: [video for run in runs for video in run["videos"]] for layer, runs in found.items()}, folder / "consistency.png")
    print_scores(found)
    print(f"look at {folder / 'comparison.png'} and {folder / 'comparison.gif'}")


def captioned(name, picture):
    """A picture uint8 [h, w, 3] with its name above it."""
    from PIL import Image, ImageDraw
    caption = Image.new("RGB", (picture.shape[1], 16), "white")
    ImageDraw.Draw(caption).text((4, 2), name, fill="black")
    return np.concatenate([np.asarray(caption), picture])


def plot_consistency(videos, path):
    """Temporal consistency against the segments since the first appearance, a line for each {name: videos}."""
    with plot(path, xlabel="segments since the first appearance", ylabel="hidden attributes that came back", ylim=(0, 1.03)) as axes:
        for name, own in videos.items():
            by_distance = {}
            for _, distance, same in (item for video in own for item in video["returns"]):
                by_distance.setdefault(distance, []).append(same)
            axes.plot(sorted(by_distance), [np.mean(by_distance[distance]) for distance in sorted(by_distance)], marker="o", label=name)
        axes.axhline(CHANCE["rooms"], color="0.6", linestyle=":", label="chance")
        axes.locator_params(axis="x", integer=True)


def natural(track):
    """Fraction of the steps between drawings in which a character neither vanishes, nor jumps farther than it can run, nor jitters."""
    there, step = track.error < THERE, np.diff(track.x)
    back = np.append(False, (step[1:] * step[:-1] < 0) & (np.minimum(np.abs(step[1:]), np.abs(step[:-1])) > 0.02))
    far = (np.abs(step) > 0.11) | (np.abs(np.diff(track.y)) > 0.12)
    return np.mean(there[1:] & there[:-1] & ~far & ~back)


# ----------------------------------------------------------------------------------------------------
# 4. The command line
# ----------------------------------------------------------------------------------------------------


def load_stage(args, config):
    """The trained network of a stage, and where it was found."""
    path = find_checkpoint(args.out_dir, config, args.stage)
    if not path:
        raise UserError(f"{run_folder(args.out_dir, config, args.stage) / 'model.safetensors'} is missing; train it with: "
                        f"python ttt_minute.py --stage {args.stage} --layer {config.layer} --preset {args.preset}" + f" --seed {config.seed}" * (config.seed > 0))
    return load_checkpoint(path).eval(), path


@together
def main():
    parser = Parser("sample.py", description="Turn a storyboard into a video with a trained stage.",
                    epilog="example: python sample.py --stage 9s --storyboard story.txt --out video.mp4")
    parser.add_argument("--stage", choices=list(STAGES), default="63s", help="the stage that was trained (default 63s; its weights ship in assets/)")
    parser.add_argument("--preset", choices=list(PRESETS), default="pocket")
    parser.add_argument("--layer", choices=list(LAYERS), default="ttt_mlp")
    parser.add_argument("--storyboard", help="Format 3 text (.txt), JSON or JSONL; a paragraph is 3 seconds (default: a held-out one)")
    parser.add_argument("--out", help="the video to write (default: OUT_DIR/PRESET-LAYER/STAGE/video.mp4)")
    parser.add_argument("--out_dir", default="out", help="where runs were written (default out)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, and of the held-out storyboard")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance", type=float, nargs=2, default=(1.0, 4.0), metavar=("LOW", "HIGH"),
                        help="guidance at the first and the last step (default 1 4)")
    parser.add_argument("--evaluate", action="store_true", help="score held-out storyboards of the pocket world on the paper's four axes")
    parser.add_argument("--compare", action="store_true", help="train and score all layers, or those of --layers")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), metavar="LAYER", help="what --compare compares (default: all)")
    parser.add_argument("--minutes", type=float, help="with --compare: train every layer for so long, in place of the preset's steps")
    parser.add_argument("--train_seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of the training; several with --compare (default 0)")
    parser.add_argument("--videos", type=int, default=8, help="how many to score, from --seed on (default 8)")
    parser.add_argument("--check", action="store_true", help="only say what is in the storyboard, and whether its texts are too long")
    parser.add_argument("--negative", help="what to move away from, for segments whose storyboard names nothing")
    parser.add_argument("--export", metavar="FILE", help="write the stage's weights in half precision instead, as the files in assets/ are")
    dataset.add_encoder_flags(parser)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    add_device_flags(parser)
    args = parser.parse_args()
    if (args.layers or args.minutes or len(args.train_seeds) > 1) and not args.compare:
        raise UserError("--layers, --minutes and several --train_seeds need --compare")
    if not 1 <= args.steps <= 1000:
        raise UserError(f"--steps {args.steps}: between 1 and 1000 is needed")
    boards = dataset.parse_storyboard(args.storyboard) if args.storyboard else [held_out(STAGES[args.stage].segments, args.seed)]
    boards = [[dataset.Segment(s.text, s.negative or args.negative, s.scene) for s in board] for board in boards]
    where = args.storyboard or "held-out storyboard"
    config = Config(**{**PRESETS[args.preset], "preset": args.preset, "layer": args.layer, "seed": args.train_seeds[0]})
    if args.check:
        text_encoder = dataset.T5Words(args.text_encoder) if args.text_encoder else dataset.PocketText()
        return check_boards(boards, text_encoder, config.text_len, where)
    devices = join(pick_device(args.device), args.context_parallel, args.shard)
    device = devices.device
    if devices.count > 1 and (args.evaluate or args.compare or args.export):
        raise UserError("--evaluate, --compare and --export need one process; start them without torchrun")
    if args.evaluate or args.compare:
        segments = STAGES[args.stage].segments
        if segments < 3 or args.preset == "5b" or args.videos < 1:
            raise UserError("stages of 9s and longer of the presets pocket and small can be scored, where rooms return, on at least one video")

        def evaluate_layer(config):
            model, path = load_stage(args, config)
            codec, text_encoder = encoders_of(model, path, args, device)
            folder, seeds = run_folder(args.out_dir, model.config, args.stage), range(args.seed, args.seed + args.videos)
            settings = dict(steps=args.steps, guidance=list(args.guidance))
            return evaluate_stage(model.to(device), path, codec, text_encoder, segments, seeds, folder, **settings)

        if args.compare:
            return compare(args, config, args.layers or list(LAYERS), evaluate_layer)
        return print_scores({args.layer: [evaluate_layer(config)]})
    out = Path(args.out or run_folder(args.out_dir, config, args.stage) / "video.mp4")
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: the name must end in .mp4")

    model, path = devices.first(lambda: load_stage(args, config)) or (None, None)
    if args.export:
        save_model(model.half(), args.export, stage=args.stage)
        return print(f"{args.export}: stage {args.stage} of {path}, in half precision")

    def read():
        codec, text_encoder = encoders_of(model, path, args, device)
        return codec, [embed(board, text_encoder, where) for board in boards]     # the text encoder has the device to itself

    codec, texts = devices.first(read) or (None, None)
    half = args.preset == "5b" and device.type == "cuda"                          # 14 GB of weights in place of 29
    network = build(lambda: model.to(torch.bfloat16 if half else torch.float32), devices)
    check_devices(devices, network.config, {})
    for number, (board, (text, negative)) in enumerate(zip(boards, devices.tell(texts)), 1):
        name = out if len(boards) == 1 else out.with_stem(f"{out.stem}-{number}")
        if len(board) < devices.context:
            raise UserError(f"--context_parallel {devices.context}: {where} has {len(board)} segments, each for one device")
        begin = time.perf_counter()
        latents = generate(network, text, negative, args.seed, steps=args.steps, guidance=tuple(args.guidance))
        devices.first(lambda: save_video(codec.decode(latents), board, name))
        print(f"{name}: {3 * len(board)} seconds of video by {path} in {time.perf_counter() - begin:.0f} s; contact sheet {name.with_suffix('.png')}")


if __name__ == "__main__":
    from sample import main         # as one module, so that errors raised elsewhere are the errors caught here
    run_main(main)
