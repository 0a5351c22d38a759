// Asks twice on one kept-alive connection, case by case, as node's own client: `node client.js HOST PORT CASE...`, CASE = METHOD:PATH.
// One JSON line for each: what came for the path and for what is asked behind it.
const http = require('http');
const [host, port, ...cases] = process.argv.slice(2);
function ask(agent, method, path) {
  return new Promise((done) => {
    const request = http.request({host, port, method, path, agent, headers: {host: 'h'}}, (response) => {
      const parts = [];
      response.on('data', (part) => parts.push(part));
      response.on('end', () => done([response.statusCode, Buffer.concat(parts).toString('latin1'), response.complete]));
      response.on('error', () => done([response.statusCode, '', false]));
    });
    request.setTimeout(10000, () => request.destroy());
    request.on('error', () => done([0, '', false]));
    request.end();
  });
}
(async () => {
  for (const one of cases) {
    const agent = new http.Agent({keepAlive: true, maxSockets: 1});
    const [method, path] = one.split(':');
    const first = await ask(agent, method, path + 'a');
    const next = await ask(agent, 'GET', path + 'next');
    agent.destroy();
    console.log(JSON.stringify([first, next]));
  }
})();
