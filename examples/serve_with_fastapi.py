"""A classifier behind FastAPI on the plain API: pictures of requests that come together pass the tower together.

python examples/serve_with_fastapi.py my-classifier     # then: curl -F file=@cat.jpg http://127.0.0.1:8000/classify
python examples/serve_with_fastapi.py                   # trains one on the shipped pictures and asks itself once

`taskres serve` (docs/serve.md) does the same with limits, several classifiers, metrics and an orderly end. This is for
those who want their own.
"""

import asyncio
import io
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, HTTPException, UploadFile

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.errors import ImageError
from taskres_hf.pictures import read_image

MAX_BATCH = 32


def make_app(folder: str) -> FastAPI:
    model = TaskResCLIPForImageClassification.from_pretrained(folder)
    queue: asyncio.Queue = asyncio.Queue(maxsize=128)
    tower = ThreadPoolExecutor(1)  # one thread for torch: two would compete for the same cores

    @torch.no_grad()
    def classify(pictures: list) -> list[dict[str, float]]:
        pixels = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        rows = model(pixels).logits.softmax(dim=1).tolist()
        return [dict(zip(model.class_names, row, strict=True)) for row in rows]

    async def work() -> None:
        while True:
            batch = [await queue.get()]
            while len(batch) < MAX_BATCH and not queue.empty():  # whoever came while the last batch was in the tower
                batch.append(queue.get_nowait())
            pictures, answers = zip(*batch, strict=True)
            try:
                loop = asyncio.get_running_loop()
                for answer, scores in zip(answers, await loop.run_in_executor(tower, classify, pictures), strict=True):
                    answer.cancelled() or answer.set_result(scores)
            except Exception as error:
                for answer in answers:
                    answer.done() or answer.set_exception(error)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def post(file: UploadFile) -> dict[str, float]:
        content = await file.read()
        try:
            picture = await asyncio.to_thread(read_image, content)  # within the library's limits
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        if queue.full():
            raise HTTPException(503, "busy", {"Retry-After": "1"})
        answer = asyncio.get_running_loop().create_future()
        queue.put_nowait((picture, answer))
        return await answer

    return app


def ask_once() -> None:
    from fastapi.testclient import TestClient

    spec, splits = demo_tasks()["food"], demo_dataset("food")
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    TaskResTrainer(model, TaskResTrainingArguments(shots=4, on_short="ignore"), splits["train"]).train()
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    picture = io.BytesIO()
    splits["test"][0]["image"].save(picture, "PNG")
    with TestClient(make_app(folder)) as client:
        scores = client.post("/classify", files={"file": ("picture.png", picture.getvalue())}).json()
        print({name: round(score, 3) for name, score in sorted(scores.items(), key=lambda item: -item[1])})
        print(client.post("/classify", files={"file": ("text.png", b"no picture")}).json())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import uvicorn

        uvicorn.run(make_app(sys.argv[1]))
    else:
        ask_once()
