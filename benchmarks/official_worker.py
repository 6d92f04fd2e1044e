"""The official DreamLLM under the stopwatch of `benchmarks/speed.py`, which starts this file with an interpreter of its
own (torch, transformers 4.35.2, diffusers 0.24.0 and what the official code imports). Reads one word a line from
standard input and answers with seconds: the official code runs as it is."""
import sys
import time
import types
from importlib.machinery import ModuleSpec

import torch


class Nothing:
    """Stands for torchvision's transforms, which the official code names but these measurements do not use."""
    def __getattr__(self, name):
        return self

    def __call__(self, *args, **options):
        return self


def without_torchvision():
    """torchvision must fit torch's build exactly, and often there is none that does."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        module = types.ModuleType("torchvision")
        module.transforms, module.__version__ = Nothing(), "0"
        module.__spec__ = ModuleSpec("torchvision", None)
        sys.modules["torchvision"] = module


def main():
    code, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    sys.path.insert(0, code)
    without_torchvision()
    from omni.models.dreamllm.configuration_dreamllm import DreamLLMConfig
    from omni.models.dreamllm.modeling_dreamllm import DreamLLMForCausalMLM
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    config = DreamLLMConfig.from_pretrained(folder, local_files_only=True)
    model = DreamLLMForCausalMLM.from_pretrained(
        folder, tokenizer=tokenizer, config=config, local_files_only=True, reset_plugin_model_name_or_path=True)
    work = torch.load(folder + "/work.pt", weights_only=True)
    head = model.stable_diffusion_head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

    def step():
        model.train()
        optimizer.zero_grad(set_to_none=True)
        began = time.perf_counter()
        model(**work["batch"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - began

    @torch.no_grad()
    def picture():
        model.eval()
        began = time.perf_counter()
        model.stable_diffusion_pipeline(tokenizer, prompt=work["prompt"], num_inference_steps=20, guidance_scale=2.0)
        return time.perf_counter() - began

    @torch.no_grad()
    def bare():
        model.eval()
        x, condition = work["noise"], work["condition"]
        began = time.perf_counter()
        for t in range(999, 0, -50):
            head.unet(torch.cat([x, x]), t, encoder_hidden_states=condition)
        head.vae.decode(x)
        return time.perf_counter() - began

    @torch.no_grad()
    def text(n):
        model.eval()
        ids = work["text"][:1].expand(n, -1)
        began = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                       max_new_tokens=work["new"], min_new_tokens=work["new"], pad_token_id=0)
        return time.perf_counter() - began

    cases = {"step": step, "picture": picture, "bare": bare, "text1": lambda: text(1), "text8": lambda: text(8)}
    print("ready", torch.__version__, flush=True)
    for line in sys.stdin:
        print(f"seconds {cases[line.strip()]():.6f}", flush=True)


if __name__ == "__main__":
    main()
