/* The comparisons with these words and this verdict. Without scripts all are shown. */
for (const form of document.querySelectorAll(".find")) {
  const words = form.querySelector("input"), kind = form.querySelector("select"), count = form.querySelector("output");
  const articles = [...form.parentElement.querySelectorAll("article")];
  const texts = articles.map(article => article.textContent.toLowerCase());
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    articles.forEach((article, i) => {
      const is = (!kind.value || article.dataset.kind.split(" ").includes(kind.value)) &&
        wanted.every(word => texts[i].includes(word));
      article.hidden = !is;
      shown += is;
    });
    count.textContent = shown + " of " + articles.length;
  };
  words.addEventListener("input", show);
  kind.addEventListener("change", show);
  form.hidden = false;
  show();
}
