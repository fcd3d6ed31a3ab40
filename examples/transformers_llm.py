"""Let a language model of transformers read pictures through an exported bridge.

    python examples/transformers_llm.py FOLDER VISION LLM PICTURE "a question"

FOLDER is what `latentmodal export RUN --bridge` wrote; VISION and LLM are the models it was trained
between, or others as wide, as names on the hub or as folders.
"""

import sys

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from latentmodal.bridges import Bridge, load


@torch.no_grad()
def main(folder: str, vision: str, llm: str, picture: str, question: str) -> None:
    bridge = load(folder).eval()
    assert isinstance(bridge, Bridge), f"{folder} holds a {type(bridge).__name__}"
    processor = AutoImageProcessor.from_pretrained(vision)
    encoder = AutoModel.from_pretrained(vision)
    encoder = getattr(encoder, "vision_model", encoder)  # CLIP and SigLIP come with a text tower
    tokenizer = AutoTokenizer.from_pretrained(llm)
    model = AutoModelForCausalLM.from_pretrained(llm)

    pixels = processor(Image.open(picture).convert("RGB"), return_tensors="pt").pixel_values
    features = encoder.eval()(pixels).last_hidden_state
    wanted = bridge.config.input_tokens or features.shape[1]
    soft = bridge(features[:, -wanted:])  # without the class token, where the bridge had none

    ids = tokenizer(question, return_tensors="pt").input_ids
    embedded = torch.cat([soft, model.get_input_embeddings()(ids)], dim=1)
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    answer = model.generate(
        inputs_embeds=embedded, attention_mask=mask, max_new_tokens=16, do_sample=False
    )
    print(f"{features.shape[1]} features -> {soft.shape[1]} soft tokens of width {soft.shape[2]}")
    print("answer:", tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:6])
