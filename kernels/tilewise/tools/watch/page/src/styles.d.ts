// esbuild takes a style that is imported into the page.
declare module "*.css";
