// Draws each figure of the page from the plotly JSON that stands beside it. Nothing is fetched, and nothing is sent.
for (const script of document.querySelectorAll("script.labkit-plotly")) {
  const figure = JSON.parse(script.textContent);
  const place = script.previousElementSibling;
  const config = { responsive: true, displaylogo: false, displayModeBar: false, showSendToCloud: false };
  Plotly.newPlot(place, figure.data, figure.layout, Object.assign({}, figure.config, config));
}

// A table wider than the page scrolls; whoever has no mouse scrolls it with the arrow keys.
for (const table of document.querySelectorAll("table")) {
  if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
}
