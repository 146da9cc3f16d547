// Makes the page: one file of HTML with its script and style inside. `node build.mjs [FILE]`; two runs give the
// same bytes.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = (name) => fileURLToPath(new URL(name, import.meta.url));
const out = process.argv[2] ?? here("../page.html");

const made = await build({
  absWorkingDir: here("."),
  entryPoints: ["src/main.tsx"],
  bundle: true,
  minify: true,
  write: false,
  outdir: "out",
  format: "iife",
  target: "es2022",
  charset: "utf8",
  legalComments: "none", // they are in the list of licences
  metafile: true,
  jsx: "automatic",
  jsxImportSource: "preact",
  define: { "process.env.NODE_ENV": '"production"' },
});
const file = (ending) => made.outputFiles.find((each) => each.path.endsWith(ending)).text.trim();

// What the page is made of that others wrote, and under which licence: it must be told wherever the page goes.
const parts = Object.values(made.metafile.outputs).flatMap((output) => Object.entries(output.inputs));
const used = parts.filter(([, { bytesInOutput }]) => bytesInOutput > 0).map(([path]) => path);
const packages = [
  ...new Set(used.flatMap((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? [])),
].sort();
const licences = packages.map((name) => {
  const { version } = JSON.parse(readFileSync(here(`node_modules/${name}/package.json`), "utf8"));
  const found = ["LICENSE", "LICENSE.md", "LICENSE.txt"].find((each) =>
    existsSync(here(`node_modules/${name}/${each}`)),
  );
  if (!found) throw new Error(`${name} ${version} has no file with its licence`);
  return `${name} ${version}\n\n${readFileSync(here(`node_modules/${name}/${found}`), "utf8").trim()}`;
});

// `</script` inside a string would end the script; replacements are functions because `$` has a meaning in text.
const script = file(".js").replaceAll("</script", "<\\/script");
const page = readFileSync(here("src/page.html"), "utf8")
  .replace("/* licences */", () => licences.join(`\n\n${"-".repeat(80)}\n\n`))
  .replace("/* style */", () => file(".css"))
  .replace("/* script */", () => script);
for (const placeholder of ["__RECORDING__", "__TITLE__"]) {
  const found = page.split(placeholder).length - 1;
  if (found !== 1) throw new Error(`${placeholder} stands ${found} times in the page: expected once`);
}
writeFileSync(out, page);
console.log(`${out}: ${Math.round(page.length / 1024)} KB`);
