package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// compressor is one way to compress a report.
type compressor struct {
	name string
	writer
}

type writer interface {
	io.WriteCloser
	Reset(io.Writer)
}

func compressors() ([]compressor, error) {
	var all []compressor
	for _, level := range []int{1, 3, 4, 5, 6, 9} {
		zw, err := gzip.NewWriterLevel(nil, level)
		if err != nil {
			return nil, err
		}
		all = append(all, compressor{fmt.Sprintf("gzip, level %d", level), zw})
	}
	for _, level := range []zstd.EncoderLevel{zstd.SpeedFastest, zstd.SpeedDefault, zstd.SpeedBetterCompression, zstd.SpeedBestCompression} {
		zw, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		all = append(all, compressor{fmt.Sprintf("zstd, %s", level), zw})
	}
	return all, nil
}

// compression compresses the reports in all ways that the module could use. It uses gzip at level 6.
func (h *harness) compression(_ context.Context, _ []*contender, results *results) error {
	progress.Print("compressing reports")
	ways, err := compressors()
	if err != nil {
		return err
	}
	for _, size := range h.sizes {
		all := make([]compressionResult, len(ways))
		took := make([][]time.Duration, len(ways))
		for range compressionRounds {
			for i, way := range ways {
				n, more, err := way.compress(size.document, compressionWork/compressionRounds)
				if err != nil {
					return err
				}
				all[i] = compressionResult{size: size, way: way.name, bytes: n}
				took[i] = append(took[i], more...)
			}
		}
		for i := range all {
			all[i].took = median(took[i], func(d time.Duration) time.Duration { return d })
		}
		results.compression = append(results.compression, all...)
	}
	return nil
}

const (
	// compressionWork is how long a document is compressed in one way at least, so that the ways can be told apart.
	compressionWork = 250 * time.Millisecond

	// compressionRounds is into how many rounds this time is divided. In each, the ways come in turn.
	compressionRounds = 5
)

// compress compresses a document again and again for some time, at least once. It returns how large the document becomes,
// and how long each time took.
func (c compressor) compress(document []byte, lasts time.Duration) (n int, took []time.Duration, err error) {
	var compressed bytes.Buffer
	for start := time.Now(); len(took) == 0 || time.Since(start) < lasts; {
		compressed.Reset()
		begin := time.Now()
		c.Reset(&compressed)
		if _, err := c.Write(document); err != nil {
			return 0, nil, err
		}
		if err := c.Close(); err != nil {
			return 0, nil, err
		}
		took = append(took, time.Since(begin))
	}
	return compressed.Len(), took, nil
}
