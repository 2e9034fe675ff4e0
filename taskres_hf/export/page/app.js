// Classifies a picture that is dropped, pasted or chosen. Everything a user wrote is shown with textContent.
import { prepare } from "./pictures.js";

const FIRST = 8; // classes shown before "show all"
const $ = (id) => document.getElementById(id);
const at = document.documentElement.dataset;
let classify, RawImage, processor, several, latest = 0;

// state: loading, ready, busy, done or error
function say(state, text) {
  $("status").textContent = text;
  $("status").dataset.state = state;
}

async function load() {
  const library = await import(at.transformers);
  const { env, pipeline } = library;
  const runtime = new URL(at.runtime, document.baseURI).href;
  Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: new URL(".", document.baseURI).pathname });
  Object.assign(env, { useBrowserCache: false, useWasmCache: false }); // the browser's own cache notices a new export
  env.backends.onnx.wasm.wasmPaths = {
    mjs: `${runtime}ort-wasm-simd-threaded.mjs`,
    wasm: `${runtime}ort-wasm-simd-threaded.wasm`,
  };
  RawImage = library.RawImage;
  const config = await (await fetch("model/config.json")).json();
  classify = await pipeline("image-classification", "model", { device: "wasm", dtype: config["transformers.js_config"].dtype });
  several = config.problem_type === "multi_label_classification";
  processor = classify.processor.image_processor ?? classify.processor;
  processor.plan = { ...(await (await fetch("model/preprocessor_config.json")).json()) };
  processor.do_resize = processor.do_center_crop = false; // pictures.js does both, as in training
}

// Labels with probabilities of a picture file, most probable first.
async function answers(blob) {
  const { pixels, width, height } = await prepare(blob, processor.plan);
  const image = new RawImage(pixels, width, height, 3);
  if (!several) return classify(image, { top_k: null });
  // The pipeline knows only softmax for pictures; of several labels each has a probability of its own.
  const { logits } = await classify.model({ pixel_values: (await classify.processor([image])).pixel_values });
  const rows = Array.from(logits.data, (logit, k) => ({ label: classify.model.config.id2label[k], score: 1 / (1 + Math.exp(-logit)) }));
  return rows.sort((a, b) => b.score - a.score);
}

function show(rows, count) {
  const lines = rows.slice(0, count).map(({ label, score }) => {
    const item = document.createElement("li");
    item.dataset.score = String(score);
    const line = item.appendChild(document.createElement("div"));
    line.className = "line";
    line.appendChild(document.createElement("span")).textContent = label;
    line.appendChild(document.createElement("span")).textContent = `${(100 * score).toFixed(1)} %`;
    const track = item.appendChild(document.createElement("div"));
    track.className = "track";
    const bar = track.appendChild(document.createElement("div"));
    bar.className = "bar";
    bar.style.width = `${100 * score}%`;
    return item;
  });
  $("classes").replaceChildren(...lines);
  $("more").hidden = rows.length <= count;
  $("more").textContent = `Show all ${rows.length} classes`;
  $("more").onclick = () => show(rows, rows.length);
}

async function take(blob) {
  const mine = ++latest;
  if (!classify || !blob) return;
  say("busy", "Classifying ...");
  try {
    const rows = await answers(blob);
    if (mine !== latest) return; // another picture came meanwhile
    URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(blob);
    show(rows, FIRST);
    $("result").hidden = false;
    say("done", "");
  } catch (error) {
    if (mine === latest) say("error", `This picture cannot be classified: ${error.message ?? error}`);
  }
}

const drop = $("drop");
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
$("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });

try {
  await load();
  $("file").disabled = false;
  say("ready", "Ready.");
} catch (error) {
  say("error", `The classifier cannot be loaded: ${error.message ?? error}`);
}
