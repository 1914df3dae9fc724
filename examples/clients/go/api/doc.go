// Package api is a client of the Task API. Its code is generated from openapi.yaml:
//
//go:generate go tool oapi-codegen -generate types,client -package api -o client.gen.go ../../../../openapi.yaml
package api

import _ "github.com/oapi-codegen/runtime" // the generated code imports it
