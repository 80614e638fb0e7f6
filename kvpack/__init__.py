"""kvpack packs scattered KV cache blocks on the GPU and moves them between workers."""
