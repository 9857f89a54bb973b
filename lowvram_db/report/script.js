"use strict";

/* Before and after: the slider lies over both pictures. */
for (const pair of document.querySelectorAll(".pair")) {
  const slider = pair.querySelector("input");
  const show = () => {
    pair.style.setProperty("--split", slider.value + "%");
    slider.setAttribute("aria-valuetext", `${slider.value}% before, ${100 - slider.value}% after`);
  };
  slider.addEventListener("input", show);
  show();
}

/* One guidance scale and seed at a time; without scripts all of them are shown. */
for (const picker of document.querySelectorAll(".picker")) {
  const select = picker.querySelector("select");
  const choices = picker.parentElement.querySelectorAll("[data-choice]");
  const show = () => {
    for (const choice of choices) choice.hidden = choice.dataset.choice !== select.value;
  };
  select.addEventListener("change", show);
  picker.hidden = false;
  show();
}

/* Values under the pointer, or at the step that the slider is moved to. */
const figure = (value) => (value === undefined ? "–" : String(Number(value.toPrecision(4))));

const valueAt = (points, step) => {
  let value;
  for (const [at, known] of points) {
    if (at > step) break;
    value = known;
  }
  return value;
};

for (const chart of document.querySelectorAll(".chart")) {
  const curves = JSON.parse(chart.dataset.curves);
  const [first, last] = [Number(chart.dataset.first), Number(chart.dataset.last)];
  const scrub = chart.querySelector(".scrub");
  const [slider, output] = [scrub.querySelector("input"), scrub.querySelector("output")];
  const [drawing, cursor] = [chart.querySelector("svg"), chart.querySelector(".cursor")];
  const show = () => {
    const step = Number(slider.value);
    const values = curves.map(({ label, points }) => `${label} ${figure(valueAt(points, step))}`);
    output.textContent = `${step}: ${values.join(", ")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    const across = ((step - first) / Math.max(1, last - first)) * 1000;
    cursor.setAttribute("d", `M${across},0V300`);
  };
  slider.addEventListener("input", show);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    slider.value = Math.round(first + ((event.clientX - box.left) / box.width) * (last - first));
    show();
  });
  scrub.hidden = false;
  show();
}
