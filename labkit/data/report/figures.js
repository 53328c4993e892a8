// Draws each figure of the page from the plotly JSON that stands beside it. Nothing is fetched.
for (const script of document.querySelectorAll("script.labkit-plotly")) {
  const figure = JSON.parse(script.textContent);
  const place = script.previousElementSibling;
  const config = { responsive: true, displaylogo: false, showSendToCloud: false };
  Plotly.newPlot(place, figure.data, figure.layout, Object.assign(config, figure.config || {}));
}
