// A certified OpenID provider on loopback, for tests: node provider.mjs PEOPLE.json
// People are read from the file at every look, so that tests change what is told of them. Prints its address.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { generateKeyPairSync } from "node:crypto";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const require = createRequire(path.join(process.cwd(), "here.js"));
const { default: Provider } = await import(pathToFileURL(require.resolve("oidc-provider")).href);
const people = process.argv[2];

const server = createServer();
server.listen(0, "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const key = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey.export({ format: "jwk" });
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: "flops",
        client_secret: "a secret: of 100 % & more",
        application_type: "native", // loopback, on any port
        redirect_uris: ["http://127.0.0.1/login/oidc"],
        response_types: ["code"],
        grant_types: ["authorization_code"],
        token_endpoint_auth_method: "client_secret_basic",
      },
      {
        client_id: "flops-public",
        application_type: "native",
        redirect_uris: ["http://127.0.0.1/login/oidc"],
        response_types: ["code"],
        grant_types: ["authorization_code"],
        token_endpoint_auth_method: "none",
      },
    ],
    claims: { openid: ["sub"], email: ["email", "email_verified"], profile: ["preferred_username", "groups"] },
    findAccount: async (_, id) => {
      const told = JSON.parse(readFileSync(people))[id];
      return told && { accountId: id, claims: async () => ({ sub: id, ...told }) };
    },
    cookies: { keys: ["for tests"] },
    jwks: { keys: [{ ...key, kid: "first", alg: "RS256", use: "sig" }] },
    pkce: { required: () => true },
  });
  server.on("request", provider.callback());
  console.log(issuer);
});
