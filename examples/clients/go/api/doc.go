// Package api is a client of the Task API. Its code is generated from openapi.yaml: see docs/CLIENTS.md.
package api

import _ "github.com/oapi-codegen/runtime" // the generated code imports it
