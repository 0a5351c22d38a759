// What node's own HTTP server reads, one JSON line for each whole request: `node node.js PORT`.
const http = require('http');
const server = http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', () => {
    if (!request.complete) return;
    console.log(JSON.stringify({at: 'node', method: request.method, target: request.url,
                                body: Buffer.concat(parts).toString('latin1'), host: request.headers.host || ''}));
    response.writeHead(200, {'x-seen': request.url.slice(0, 100), 'content-length': 4});
    response.end(request.method === 'HEAD' ? undefined : 'seen');
  });
  request.on('error', () => {});
});
server.keepAliveTimeout = 90000;    // longer than Narrows keeps an idle connection
server.listen(Number(process.argv[2]), '::');
