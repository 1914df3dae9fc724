# Images of this checkout. The folder of this file is the context:
#	docker build --tag caddy-fsbroker .                          Caddy with the plugin
#	docker build --tag fsbroker-backend --target backend .       the broker and the node of examples/demo
ARG CADDY_VERSION=2.11.9
ARG GO_VERSION=1.26

FROM golang:${GO_VERSION}-alpine AS source
ENV CGO_ENABLED=0
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .

FROM source AS build-caddy
ARG CADDY_VERSION
RUN go run github.com/caddyserver/xcaddy/cmd/xcaddy@v0.4.5 build v${CADDY_VERSION} --with github.com/caddy-fsbroker/caddy-fsbroker@v0.0.0=/src --output /usr/bin/caddy

FROM source AS build-backend
RUN go build -trimpath -o /usr/bin/backend ./examples/demo/backend

FROM alpine:3.22 AS backend
COPY --from=build-backend /usr/bin/backend /usr/bin/backend
CMD ["backend"]

FROM caddy:${CADDY_VERSION} AS caddy
COPY --from=build-caddy /usr/bin/caddy /usr/bin/caddy
