"""CogVideoX's transformer as diffusers stores it, read into the DiT of ttt_minute.py and written back."""

from pathlib import Path

from einops import rearrange

from dataset import UserError, reading

# diffusers' names (CogVideoXTransformer3DModel) of fields of our Config, and of parts of the names of tensors
FIELDS = {"channels": "in_channels", "height": "sample_height", "width": "sample_width",
          "text_len": "max_text_seq_length", "text_dim": "text_embed_dim", "depth": "num_layers",
          "heads": "num_attention_heads", "head_width": "attention_head_dim", "time_dim": "time_embed_dim",
          "patch": "patch_size"}
NAMES = {"blocks.": "transformer_blocks.", "norm_1": "norm1", "norm_2": "norm2",
         "attention.qkv.0": "attn1.to_q", "attention.qkv.1": "attn1.to_k", "attention.qkv.2": "attn1.to_v",
         "attention.out": "attn1.to_out.0", "attention.": "attn1.", "mlp.0": "ff.net.0.proj",
         "mlp.2": "ff.net.2", "patch_in": "patch_embed.proj", "text_in": "patch_embed.text_proj",
         "time.": "time_embedding.", "norm_out.": "norm_out.norm.", "modulate_out": "norm_out.linear",
         "patch_out": "proj_out"}


def their_names(model):
    """{our name: diffusers'} of every tensor that the pre-trained network has."""
    names = {name: name for name in model.state_dict() if ".global_layer." not in name}
    for ours, theirs in NAMES.items():
        names = {name: their.replace(ours, theirs) for name, their in names.items()}
    return names


def load(folder, make):
    """make(sizes), fields of Config, filled with the weights of a folder: the pipeline's or its transformer/.
    Variants, shards and precisions are diffusers' matter. Host memory: what diffusers reads and what make()
    returns, at 5B 22 + 29 GB. Raises UserError if the folder does not hold this network."""
    from diffusers import CogVideoXTransformer3DModel
    where = Path(folder, "transformer") if Path(folder, "transformer").is_dir() else folder
    with reading(f"{folder}: CogVideoX's transformer"):
        settings = dict(use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
        settings["output_loading_info"] = True
        theirs, found = CogVideoXTransformer3DModel.from_pretrained(where, **settings)
        wrong = [*found["missing_keys"], *found["unexpected_keys"]]
        assert not wrong, f"tensor {wrong[0]} is missing or one too many"
        config = theirs.config
        if not config.use_rotary_positional_embeddings or config.patch_size_t or config.norm_eps != 1e-5:
            raise UserError(f"{folder}: this network is CogVideoX-5B's; 2B, 1.5 and another norm_eps differ")
        model = make({ours: config[name] for ours, name in FIELDS.items()})
        weights = theirs.state_dict()
        weights = {ours: weights[name] for ours, name in their_names(model).items()}
        weights["patch_in.weight"] = weights["patch_in.weight"].flatten(1)  # a convolution there
        model.load_state_dict(weights, strict=False)
    return model


def save(model, folder, dtype):
    """The base network in diffusers' format: config.json and safetensors, in shards of 5 GB."""
    from diffusers import CogVideoXTransformer3DModel
    config, weights = model.config, model.state_dict()
    fields = {name: getattr(config, ours) for ours, name in FIELDS.items()}
    fields |= dict(use_rotary_positional_embeddings=True, out_channels=config.channels)
    theirs = CogVideoXTransformer3DModel(**fields).to(dtype)
    weights = {name: weights[ours] for ours, name in their_names(model).items()}
    p = config.patch
    weights["patch_embed.proj.weight"] = rearrange(model.patch_in.weight, "D (C p q) -> D C p q", p=p, q=p)
    theirs.load_state_dict(weights)
    theirs.save_pretrained(folder, max_shard_size="5GB")
