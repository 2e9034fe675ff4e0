// A picture file as the image tower sees it: resized and cropped as the image processor does it with Pillow.
// A canvas resizes by a method of the browser's own choice, which moves probabilities; so only decoding is left to it.

const BITS = 22; // Pillow multiplies bytes with whole numbers of so many bits after the point

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
// Number in preprocessor_config.json -> half width and filter, as in Pillow's Resample.c.
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, (x) => {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  }],
};

// For each of `to` places along a line of `from` bytes: the first byte it is made of, and their weights.
function coefficients(from, to, [half, filter]) {
  const scale = from / to, stretch = Math.max(scale, 1), support = half * stretch;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = [];
    for (let i = first; i < last; i++) weights.push(filter((i - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => Math.trunc((w / sum) * 2 ** BITS + (w < 0 ? -0.5 : 0.5)))];
  });
}

// One pass over `lines` lines of RGB, each of `from` pixels; `step` and `stride` say how far apart pixels and lines are.
function pass(source, from, to, lines, filter, step, stride, outStep, outStride, target) {
  if (from === to) filter = null;
  const table = filter && coefficients(from, to, filter);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < to; place++) {
      const [first, weights] = table ? table[place] : [place, [2 ** BITS]];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (BITS - 1), index = line * stride + first * step + channel;
        for (const weight of weights) { sum += weight * source[index]; index += step; }
        target[line * outStride + place * outStep + channel] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** BITS)));
      }
    }
  }
  return target;
}

// RGB bytes [height, width, 3] resized, across first and then down, with bytes between.
export function resize(pixels, width, height, toWidth, toHeight, resample) {
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`resampling ${resample} is not known here`);
  const across = pass(pixels, width, toWidth, height, filter, 3, 3 * width, 3, 3 * toWidth, new Uint8ClampedArray(3 * toWidth * height));
  return pass(across, height, toHeight, toWidth, filter, 3 * toWidth, 3, 3 * toWidth, 3, new Uint8ClampedArray(3 * toWidth * toHeight));
}

// Width and height that a picture is resized to.
function target({ size }, width, height) {
  if (!size.shortest_edge) return [size.width, size.height];
  const longer = Math.trunc((size.shortest_edge * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [size.shortest_edge, longer] : [longer, size.shortest_edge];
}

function crop(pixels, width, height, wide, high) {
  const left = Math.floor((width - wide) / 2), top = Math.floor((height - high) / 2);
  const out = new Uint8ClampedArray(3 * wide * high);
  for (let row = 0; row < high; row++) {
    const start = 3 * ((row + top) * width + left);
    out.set(pixels.subarray(start, start + 3 * wide), 3 * row * wide);
  }
  return out;
}

// RGB bytes of a file, upright, colours as they are stored; what is transparent becomes white.
async function decoded(blob) {
  const bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8ClampedArray(3 * width * height);
  for (let i = 0, j = 0; j < pixels.length; i += 4) {
    pixels[j++] = rgba[i]; pixels[j++] = rgba[i + 1]; pixels[j++] = rgba[i + 2];
  }
  return { pixels, width, height };
}

// What the processor of a plan (preprocessor_config.json) makes of a file, before it scales bytes to numbers.
export async function prepare(blob, plan) {
  let { pixels, width, height } = await decoded(blob);
  const [wide, high] = target(plan, width, height);
  pixels = resize(pixels, width, height, wide, high, plan.resample);
  if (!plan.do_center_crop) return { pixels, width: wide, height: high };
  const { width: across, height: down } = plan.crop_size;
  return { pixels: crop(pixels, wide, high, across, down), width: across, height: down };
}
